"""A vLLM engine in a process of its own, told what to do by lines of JSON: what the demo and the tests drive.

    python examples/engine.py '{"model": "...", "l2": "kvrdma://127.0.0.1:7700"}'

Commands come on stdin, one JSON object a line; each is answered by one on stdout. At the end of stdin it shuts down.
    {"do": "add", "id": "a", "tokens": [...], "max_tokens": 64}   begin a request
    {"do": "wait", "id": "a"}                                     step the engine until it has ended
    {"do": "step", "seconds": 1.0, "until": "a"}                  step for a while, or until a request has ended
    {"do": "abort", "id": "a"}
    {"do": "reset", "connector": true}                            empty the engine's prefix cache (and kvrdma's)
    {"do": "metrics"}                                             kvrdma's counters in vLLM's Prometheus registry
    {"do": "encode", "text": "..."}                               text to token ids
vLLM's own log goes to stderr.
"""

import json
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# vLLM kills what has not shut down in time. On two idle cores a worker's end takes 2 s; on slow machines much more.
os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "30")
SHUTDOWN_TIMEOUT_S = 50.0  # of the engine's core: it waits for its workers, and for 4 s more once it has told them


class Engine:
    def __init__(self, options: dict) -> None:
        from vllm import EngineArgs, LLMEngine
        from vllm.config import KVTransferConfig

        if options.get("tensor_parallel_size", 1) == 1:
            # Left to itself vLLM gives an engine with a connector all cores, and one without all but one.
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
        transfer = None
        if options.get("connector", True):
            transfer = KVTransferConfig(
                kv_connector=options.get("connector_class", "KVRDMAConnector"),
                kv_connector_module_path=options.get("connector_module", "kvrdma.connectors.vllm"),
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config=options.get("settings", {}),
            )
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=options["model"],
                dtype=options.get("dtype", "bfloat16"),
                max_model_len=2048,
                max_num_batched_tokens=2048,
                block_size=32,  # CPU attention takes multiples of 32
                enforce_eager=True,
                seed=0,
                tensor_parallel_size=options.get("tensor_parallel_size", 1),
                num_gpu_blocks_override=options.get("num_blocks"),
                # With a connector vLLM runs the CPU worker in a process of its own; so it does without one here,
                # or a comparison would measure that.
                distributed_executor_backend="mp",
                kv_transfer_config=transfer,
            )
        )
        self.outputs: dict = {}

    def add(self, id: str, tokens: list[int], max_tokens: int = 64, **extra: object) -> dict:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0,
            ignore_eos=True,
            extra_args={"kv_transfer_params": {"kvrdma.report": True}},
        )
        self.outputs.pop(id, None)
        self.engine.add_request(id, {"prompt_token_ids": tokens, **extra}, params)
        return {}

    def wait(self, id: str, timeout: float = 120.0) -> dict:
        deadline = time.monotonic() + timeout
        while id not in self.outputs:
            if time.monotonic() > deadline:
                raise TimeoutError(f"request {id} has not ended after {timeout} s")
            self._step()
        return self.outputs[id]

    def step(self, seconds: float, until: str = "") -> dict:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and until not in self.outputs:
            if self.engine.has_unfinished_requests():
                self._step()
            else:
                time.sleep(0.01)
        return self.outputs.get(until, {})

    def abort(self, id: str) -> dict:
        self.engine.abort_request([id])
        return {}

    def reset(self, connector: bool = False) -> dict:
        return {"reset": bool(self.engine.reset_prefix_cache(reset_connector=connector))}

    def metrics(self) -> dict:
        from prometheus_client import REGISTRY

        return {
            " ".join(
                [sample.name, *(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))]
            ): sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name.startswith("kvrdma:")
        }

    def encode(self, text: str) -> dict:
        return {"tokens": self.engine.get_tokenizer().encode(text)}

    def close(self) -> None:
        self.engine.engine_core.shutdown(timeout=SHUTDOWN_TIMEOUT_S)

    def _step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                times = output.metrics
                answer = output.outputs[0]
                n_more = max(1, len(answer.token_ids) - 1)
                self.outputs[output.request_id] = {
                    "tokens": list(answer.token_ids),
                    "text": answer.text,
                    "finish_reason": answer.finish_reason,
                    "prompt_tokens": len(output.prompt_token_ids),
                    "cached_tokens": output.num_cached_tokens,
                    "ttft_s": times.first_token_latency,
                    "per_token_s": (times.last_token_ts - times.first_token_ts) / n_more,
                    "kvrdma": output.kv_transfer_params or {},
                }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM and its workers print goes to stderr
    engine = Engine(json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(engine, command.pop("do"))(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    engine.close()


if __name__ == "__main__":
    main()
