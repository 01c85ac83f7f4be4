"""A file that torch.save writes, as it is, and what it holds. See `common` for how to run it."""

import io

import numpy as np
import torch
from peers.common import Golden, main, uniform


def saved(seed: int, larger: int) -> Golden:
    def draw(name: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(uniform(name, shape, seed) * 100)

    base = draw("base", 4 + larger, 6)
    model = torch.nn.Linear(3, 2)
    model.load_state_dict({"weight": draw("weight", 2, 3), "bias": draw("bias", 2)})
    kinds = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "bool")
    tensors = {
        "base": base,
        "transposed": base.T,
        "part": base[1:3, ::2],
        "scalar": base[2, 3],
        "empty": base[:0],
        "bytes": (draw("bytes", 5).abs()).to(torch.uint8),
        "complex": torch.complex(draw("real", 3), draw("imaginary", 3)),
        "parameter": torch.nn.Parameter(draw("parameter", 7)),
        **{kind: draw(kind, 3, 2).to(getattr(torch, kind)) for kind in kinds},
    }
    held = {"ema": model.state_dict(), "tensors": tensors, "epoch": 3, "losses": [0.5, None, "x"]}
    file = io.BytesIO()
    torch.save(held, file)
    named = {f"tensors.{name}": x for name, x in tensors.items()}
    named |= {f"ema.{name}": x for name, x in model.state_dict().items()}
    dtypes = {name: str(x.dtype).removeprefix("torch.") for name, x in named.items()}
    arrays = {
        name: (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()
        for name, x in named.items()
    }
    return Golden(dtypes, {}, seed, arrays | {"written": np.frombuffer(file.getvalue(), np.uint8)})


if __name__ == "__main__":
    main({"torch_zip": saved})
