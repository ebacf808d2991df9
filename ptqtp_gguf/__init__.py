"""PTQTP trit-plane quantization for GGUF: Hugging Face checkpoints to files of 3.5 bits per weight for llama.cpp.

The library, in the order of the flow: checkpoint, recipe, quantize, convert, export, inspect, runtime.
"""

__version__ = "0.1.0"
