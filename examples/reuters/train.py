"""Trains the head beside this file: ``python train.py``, about two minutes on two cores.

The encoder stays as it is: each training document is embedded once, then the head is a logistic regression with an L2
penalty, solved to convergence, so the result does not depend on chance.
"""

import torch
from data import Batches, splits
from model import HEAD, Classifier, untrained
from safetensors.torch import save_file
from torch import Tensor, nn

PENALTY = 1e-4


@torch.no_grad()
def embedded(model: Classifier, batches: Batches) -> tuple[Tensor, Tensor]:
    """The embeddings [n, 384] and labels [n] of all batches."""
    rows = [(model.embed(**inputs), labels) for inputs, labels in batches]
    return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])


def fit(head: nn.Linear, embeddings: Tensor, labels: Tensor) -> None:
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(embeddings), labels) + PENALTY * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def main() -> None:
    model = untrained()
    parts = {name: embedded(model, Batches(*data, 64)) for name, data in splits().items()}
    fit(model.head, *parts["train"])
    save_file(model.head.state_dict(), HEAD)
    for name, (embeddings, labels) in parts.items():
        hits = model.head(embeddings).argmax(1) == labels
        print(f"{name}: {100 * hits.float().mean():.2f} % of {len(labels)}")


if __name__ == "__main__":
    main()
