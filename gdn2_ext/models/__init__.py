"""Causal language models of Gated DeltaNet-2 layers, in Hugging Face's conventions. Needs `transformers`.

Importing this registers them: `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know model type
"gated_deltanet2" from then on.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import GatedDeltaNet2Cache
from .configuration import GatedDeltaNet2Config
from .modeling import GatedDeltaNet2ForCausalLM, GatedDeltaNet2Model, GatedDeltaNet2PreTrainedModel

AutoConfig.register(GatedDeltaNet2Config.model_type, GatedDeltaNet2Config)
AutoModel.register(GatedDeltaNet2Config, GatedDeltaNet2Model)
AutoModelForCausalLM.register(GatedDeltaNet2Config, GatedDeltaNet2ForCausalLM)

__all__ = [
    "GatedDeltaNet2Cache",
    "GatedDeltaNet2Config",
    "GatedDeltaNet2ForCausalLM",
    "GatedDeltaNet2Model",
    "GatedDeltaNet2PreTrainedModel",
]
