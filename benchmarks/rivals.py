"""The step that `benchmarks/step.py` runs against: the same sizes on PyTorch, eager float32.

`peft`: transformers' Llama with PEFT's LoRA (r = 8, all linear maps). `torch`: the same network written
by hand with PyTorch's own functions, adapters beside the frozen weights, as short as it can be; with
`compiled`, through torch.compile. Both clip the gradient and end with torch.optim.AdamW, as ours does.
"""

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F_
from torch import nn

R = 8
Size = tuple[int, ...]


def step_of(size: Size, logits: Callable[[torch.Tensor], torch.Tensor], params: list) -> Callable[[], None]:
    """One training step: loss, gradient, clipping, AdamW."""
    *_, T, V, N = size
    draw = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, V, (2, N, T), generator=draw)
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)

    def run() -> None:
        loss = F_.cross_entropy(logits(ids).reshape(-1, V), labels.reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return run


def peft(size: Size) -> Callable[[], None]:
    """transformers and PEFT."""
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT uses what transformers is to rename
    D, L, H, F, _, V, _ = size
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=H,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model = get_peft_model(model, LoraConfig(r=R, lora_alpha=R, target_modules="all-linear"))
    params = [p for p in model.parameters() if p.requires_grad]
    return step_of(size, lambda ids: model(input_ids=ids).logits, params)


class Lora(nn.Module):
    """y = x Wᵀ + s (x Aᵀ) Bᵀ with W frozen."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs), requires_grad=False)
        self.A = nn.Parameter(torch.rand(R, inputs) / math.sqrt(inputs))
        self.B = nn.Parameter(torch.zeros(outputs, R))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F_.linear(x, self.W) + F_.linear(F_.linear(x, self.A), self.B)


class Block(nn.Module):
    """One layer of the Llama."""

    def __init__(self, D: int, H: int, F: int) -> None:
        super().__init__()
        self.H = H
        self.q, self.k, self.v, self.o = (Lora(D, D) for _ in range(4))
        self.gate, self.up, self.down = Lora(F, D), Lora(F, D), Lora(D, F)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        N, T, D = x.shape
        n = F_.rms_norm(x, (D,), eps=1e-5)
        q, k, v = (f(n).view(N, T, self.H, -1).transpose(1, 2) for f in (self.q, self.k, self.v))

        def turn(z: torch.Tensor) -> torch.Tensor:
            a, b = z.chunk(2, -1)
            return z * cos + torch.cat([-b, a], -1) * sin

        a = F_.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(N, T, D))
        n = F_.rms_norm(x, (D,), eps=1e-5)
        return x + self.down(F_.silu(self.gate(n)) * self.up(n))


class Net(nn.Module):
    """The whole network, its head tied."""

    def __init__(self, D: int, L: int, H: int, F: int, T: int, V: int, N: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, D) / math.sqrt(D), requires_grad=False)
        self.blocks = nn.ModuleList(Block(D, H, F) for _ in range(L))
        E = D // H
        angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, E, 2) / E)
        self.cos, self.sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table[ids]
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F_.linear(F_.rms_norm(x, (x.shape[-1],), eps=1e-5), self.table)


def by_hand(size: Size, compiled: bool = False) -> Callable[[], None]:
    """The network above, eager or through torch.compile."""
    torch.manual_seed(0)
    net = Net(*size)
    params = [p for p in net.parameters() if p.requires_grad]
    return step_of(size, torch.compile(net) if compiled else net, params)


def peak_bytes(run: Callable[[], None]) -> int:
    """The most that PyTorch's allocator held during a run above what it held before (its profiler)."""
    run()
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
