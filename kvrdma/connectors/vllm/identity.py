"""What a vLLM engine's KV cache is interchangeable with: its key space, its shards, and each block's extras."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgpack

from kvrdma.errors import ConfigError
from kvrdma.keys import EPOCH_NBYTES, KeySpace
from kvrdma.layout import Shard
from kvrdma.settings import Settings
from kvrdma.weights import fingerprint, weight_files

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

# Of the model's config: where it was loaded from, and by what, says nothing of the values of its KV.
_VOLATILE: Final = frozenset({"_name_or_path", "transformers_version", "_commit_hash"})


def attention_spec(kv_cache_config: KVCacheConfig) -> AttentionSpec:
    """The only KV group's spec; raises `ConfigError` for models whose cache is not one group of attention."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    # Exactly these: vLLM puts null blocks into the tables of others (sliding windows, chunks), and no block of
    # theirs stands for its whole prefix.
    if len(groups) != 1 or type(groups[0].kv_cache_spec) not in {FullAttentionSpec, MLAAttentionSpec}:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise ConfigError(
            f"kvrdma serves models with one group of full attention layers for now; this one has: {kinds}. "
            "Start vLLM without the connector, or with --disable-hybrid-kv-cache-manager where the model allows it"
        )
    return groups[0].kv_cache_spec


def block_nbytes(kv_cache_config: KVCacheConfig) -> int:
    """Bytes of one block of one rank, all layers."""
    spec = attention_spec(kv_cache_config)
    return len(kv_cache_config.kv_cache_groups[0].layer_names) * int(spec.page_size_bytes)


def new_epoch() -> str:
    """A fresh epoch: random, since a counter would let two engines that were updated differently meet."""
    return secrets.token_hex(EPOCH_NBYTES)


def make_keyspace(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings) -> KeySpace:
    """All that must be equal for two engines' blocks to be interchangeable."""
    spec = attention_spec(kv_cache_config)
    model = vllm_config.model_config
    folder = model_folder(vllm_config)
    return KeySpace(
        model=folder.name if folder is not None and Path(model.model).is_dir() else str(model.model),
        weights=_weights(vllm_config, settings, folder),
        config=_config_digest(vllm_config, spec),
        kv_dtype=str(spec.dtype).removeprefix("torch."),
        attention=f"{resolve_attention(vllm_config, spec)}/{kv_cache_config.kv_cache_layout}",
        head_size=int(spec.head_size),
        layers=int(model.get_total_num_hidden_layers())
        if hasattr(model, "get_total_num_hidden_layers")
        else len(kv_cache_config.kv_cache_groups[0].layer_names),
        block_tokens=int(spec.block_size),
        namespace=settings.namespace,
    )


def make_shards(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> list[Shard]:
    """Each rank's shard, by rank; raises `ConfigError` for a parallelism that is not built yet."""
    parallel = vllm_config.parallel_config
    world = int(parallel.world_size)
    if getattr(parallel, "distributed_executor_backend", None) == "external_launcher" and world > 1:
        raise ConfigError(
            "kvrdma: external_launcher with more than one rank has a scheduler a rank and no aggregation of "
            "their reports, so ranks would see different caches; use the multiprocess executor"
        )
    if parallel.pipeline_parallel_size > 1 or getattr(parallel, "decode_context_parallel_size", 1) > 1:
        raise ConfigError("kvrdma: pipeline and context parallelism are planned but not built yet")
    tp = int(parallel.tensor_parallel_size)
    spec = attention_spec(kv_cache_config)
    heads = int(spec.num_kv_heads)
    total = int(vllm_config.model_config.get_total_num_kv_heads())
    if tp > 1 and heads * tp != total:
        raise ConfigError(
            f"kvrdma: {total} KV heads on {tp} ranks are replicated or uneven; that is planned, not built yet"
        )
    n_layers = len(kv_cache_config.kv_cache_groups[0].layer_names)
    return [Shard(0, 0, n_layers, rank * heads, (rank + 1) * heads) for rank in range(tp)]


def resolve_attention(vllm_config: VllmConfig, spec: AttentionSpec) -> str:
    """The attention back end that vLLM picks for the model: it defines what the bytes of a block mean."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    with set_current_vllm_config(vllm_config):
        backend = get_attn_backend(
            int(spec.head_size),
            vllm_config.model_config.dtype,
            vllm_config.cache_config.cache_dtype,
            use_mla=bool(vllm_config.model_config.use_mla),
        )
    return str(backend.get_name())


def layer_attention(vllm_config: VllmConfig, layer_names: list[str]) -> set[str]:
    """The back ends that the loaded layers really use; in a worker."""
    layers = vllm_config.compilation_config.static_forward_context
    return {str(layers[name].get_attn_backend().get_name()) for name in layer_names}


def model_folder(vllm_config: VllmConfig) -> Path | None:
    """Where the model's files lie on this host, or None where it is not loaded from files."""
    model = vllm_config.model_config
    if str(getattr(vllm_config.load_config, "load_format", "auto")) == "dummy":
        return None
    if Path(model.model).is_dir():
        return Path(model.model)
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            model.model,
            revision=model.revision,
            cache_dir=vllm_config.load_config.download_dir,
            local_files_only=True,
        )
    except Exception as error:  # whatever the hub's client raises: the model is then known by no file
        logger.debug("%s: not found among local files (%s)", model.model, error)
        return None
    return Path(found)


def _weights(vllm_config: VllmConfig, settings: Settings, folder: Path | None) -> str:
    if settings.weights_version:
        return f"version:{settings.weights_version}"
    if folder is not None and weight_files(folder):
        # Who loads by another format than safetensors may read other files of the folder.
        every = str(getattr(vllm_config.load_config, "load_format", "auto")) not in {"auto", "safetensors"}
        return f"content:{fingerprint(folder, full=settings.fingerprint == 'full', every_format=every)}"
    logger.warning(
        "kvrdma: the weights of %s come from no file that can be fingerprinted, so no other engine shares this "
        "cache; set weights_version to name them",
        vllm_config.model_config.model,
    )
    return f"private:{secrets.token_hex(16)}"


def _config_digest(vllm_config: VllmConfig, spec: AttentionSpec) -> str:
    """What else changes the values of KV: the model's config with its overrides, dtypes, quantisation, scales."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    config = {k: v for k, v in model.hf_config.to_dict().items() if k not in _VOLATILE}
    parts: dict[str, Any] = {
        "hf": config,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "cache_dtype": str(cache.cache_dtype),
        "kv_scales": bool(getattr(cache, "calculate_kv_scales", False)),
        "sliding_window": getattr(spec, "sliding_window", None),
        "spec": type(spec).__name__,
        "heads": int(model.get_total_num_kv_heads()),
    }
    raw = json.dumps(parts, sort_keys=True, default=str).encode()
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def adapter_identity(lora: LoRARequest, *, full: bool = False) -> bytes:
    """A LoRA's name, its weights' content (`full`: every byte of it) and its settings, whose scale counts as much.

    Reads files. Raises `ConfigError` where there are none to read.
    """
    folder = Path(lora.lora_path)
    if not folder.is_dir():
        raise ConfigError(f"LoRA {lora.lora_name!r}: {folder} is no folder to fingerprint")
    try:
        settings = [[file.name, file.read_bytes()] for file in sorted(folder.glob("*.json")) if file.is_file()]
    except OSError as error:
        raise ConfigError(f"LoRA {lora.lora_name!r}: {error}") from None
    digest = hashlib.blake2b(msgpack.packb(settings), digest_size=16).digest()
    return bytes(msgpack.packb([lora.lora_name, fingerprint(folder, full=full), digest]))


def make_extras(request: Request, block_tokens: int, lora: bytes = b"") -> Callable[[int], bytes] | None:
    """What tells a request's blocks from others with the same tokens: LoRA, multimodal content, salt, embeddings.

    `lora` is the `adapter_identity` of the request's LoRA, if it has one. None where nothing tells them apart.
    """
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    if request.lora_request is not None and not lora:
        raise ConfigError(f"LoRA {request.lora_request.lora_name!r}: its identity is needed")
    if not lora and not request.mm_features and not request.cache_salt and request.prompt_embeds is None:
        return None

    def extras(block: int) -> bytes:
        keys, _ = generate_block_hash_extra_keys(request, block * block_tokens, (block + 1) * block_tokens, 0)
        others = [list(key) for key in keys or () if key[0] != "lora"]
        return bytes(lora + msgpack.packb(others, use_bin_type=True)) if lora or others else b""

    return extras
