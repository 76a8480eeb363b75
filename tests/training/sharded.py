"""Run by torchrun: a model sharded by FSDP2 takes the same steps as a plain one. Prints "equal"."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from edgevlm.training.processes import leave
from edgevlm.training.vlm import VLM
from tests.training.test_original_training import loss_of, model_of, stored_batch

STEPS = 3


def train(model: VLM, name: str) -> list[float]:
    """Losses of a few steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch, losses = stored_batch(name), []
    for _ in range(STEPS):
        loss = loss_of(model, batch)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Both models on the same batch in every process: averaged gradients are the plain ones."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("e2e_llava15", "mlcd_llavanext_e2e"):
        plain, sharded = model_of(name), model_of(name, recompute=True)
        for layer in sharded.layers():
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        shards = [p.to_local().numel() for p in sharded.parameters()]  # type: ignore[attr-defined]
        whole = sum(p.numel() for p in plain.parameters())
        assert sum(shards) < 0.6 * whole, "parameters are not sharded"
        expected, found = train(plain, name), train(sharded, name)
        assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 1e-4, (name, found)
        for (key, a), (_, b) in zip(
            plain.named_parameters(), sharded.named_parameters(), strict=True
        ):
            whole_tensor = b.full_tensor()  # type: ignore[attr-defined]
            assert torch.allclose(a, whole_tensor, rtol=1e-3, atol=1e-4), (name, key)
    if dist.get_rank() == 0:
        print("equal", flush=True)
    dist.barrier()  # no process ends while another still talks to it
    leave(0)


if __name__ == "__main__":
    main()
