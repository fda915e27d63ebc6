"""The parts of examples/train.py, one concern a file."""
