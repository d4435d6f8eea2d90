"""Whether llama.cpp, given our control vector, computes the logits that a hook of ours makes."""

import ctypes
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch

from benchmarks import llama_file
from benchmarks.exports import TOLERANCE, some_vector
from benchmarks.subject import LAYERS, VOCABULARY, WIDTH, subject
from helpers.lm import exports

N_PROMPTS = 4


def main() -> None:
    """Print how far its logits are from ours. Raises ValueError where it does not do the same."""
    s = subject()
    vector, prompts = some_vector(s), s.prompts[:N_PROMPTS]
    with vector.applied(s.model), torch.no_grad():
        ours = [s.model(torch.tensor([ids])).logits[0, -1].numpy() for ids in prompts]
    with tempfile.TemporaryDirectory() as folder:
        model, control = Path(folder) / "model.gguf", Path(folder) / "control.gguf"
        llama_file.write(model, s.model)
        exports.control_vector(vector, s.model, control)
        theirs = next_logits(model, control, prompts)
    difference = np.abs(np.stack(ours) - theirs).max()
    print(f"llama.cpp adds the vector as our hook does: logits differ by {difference:.1e} at most")
    if not difference < TOLERANCE:
        raise ValueError(f"The logits of llama.cpp differ by {difference:.2g}: what it adds is another vector.")


def next_logits(model: Path, control: Path, prompts: list[list[int]]) -> np.ndarray:
    """The logits after each prompt, (prompts, vocabulary), in float32 throughout."""
    llama_cpp.llama_log_set(_unsaid, None)
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
    if not loaded:
        raise ValueError("llama.cpp does not load the model.")
    settings = llama_cpp.llama_context_default_params()
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    by_layer, found = read(control), []
    pointer = by_layer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    for ids in prompts:
        context = llama_cpp.llama_init_from_model(loaded, settings)
        if not context or llama_cpp.llama_set_adapter_cvec(context, pointer, by_layer.size, WIDTH, 1, LAYERS):
            raise ValueError("llama.cpp takes no context, or refuses the control vector.")
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise ValueError("llama.cpp does not read the prompt.")
        found.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (VOCABULARY,)).copy())
        llama_cpp.llama_free(context)
    return np.stack(found)


@llama_cpp.llama_log_callback
def _unsaid(level: int, text: bytes, data: object) -> None:
    """It tells of every tensor."""


def read(control: Path) -> np.ndarray:
    """A row a layer from the first on, as llama.cpp's own reader fills them (common_control_vector_load), which is no
    part of its library."""
    by_layer = np.zeros((LAYERS - 1, WIDTH), np.float32)
    for tensor in gguf.GGUFReader(control).tensors:
        by_layer[int(tensor.name.removeprefix("direction.")) - 1] += tensor.data
    return by_layer


if __name__ == "__main__":
    main()
