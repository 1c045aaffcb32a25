"""How long it takes to find the groups of channels and to cut all of them by half: `python bench/groups.py`.

Seconds of processor time on one thread, the median of five but for the capture; one row for each network, as in bench/RESULTS.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from multum import capture
from multum.graph.axes import axes
from multum.graph.surgery import cut
from multum.testing.zoo.images import bottlenecks

RUNS = 5
IDS = {"input_ids": torch.ones(2, 16, dtype=torch.long), "attention_mask": torch.ones(2, 16, dtype=torch.long)}


def bert_large() -> nn.Module:
    config = transformers.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=512, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1408, vocab_size=8000
    )
    config.use_cache = False
    return transformers.LlamaForCausalLM(config)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "ResNet-50": (lambda: bottlenecks((3, 4, 6, 3), 64, 1000), torch.randn(2, 3, 224, 224)),
    "BERT-large, 24 layers of 1,024": (bert_large, IDS),
    "Llama, 24 layers of 512": (llama, {"input_ids": IDS["input_ids"]}),
}


def seconds(function: Callable[..., Any], *args: Any) -> float:
    begin = time.process_time()
    function(*args)
    return time.process_time() - begin


def main() -> None:
    torch.set_num_threads(1)
    print("| network | operators and tensors | capture | finding the groups | groups: cut, whole | cutting by half |")
    for name, (make, example) in NETWORKS.items():
        model = make().eval()
        captured = seconds(capture, model, example)
        graph = capture(model, example)
        groups = axes(graph)
        keep = {group.name: range(0, group.size, 2) for group in groups if not group.reason}
        found = statistics.median(seconds(axes, graph) for _ in range(RUNS))
        took = statistics.median(seconds(cut, graph.copy(), keep) for _ in range(RUNS))
        count = f"{len(keep)}, {len(groups) - len(keep)}"
        print(f"| {name} | {len(graph.fx.nodes):,} | {captured:.1f} s | {found:.3f} s | {count} | {took:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
