"""gdn2_ext inside other libraries."""
