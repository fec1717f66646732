"""Methods that ask what patches receive, on towers without a CLS token: pruned as by hand, alone and side by side."""

from __future__ import annotations

import functools
from typing import Any

import asking
import pytest
import torch
from eager_tower import encoders, made_of, received_of
from test_contract import batch_of, by_sample, check, continued
from torch import Tensor
from zoo import get_model

import vtc
from vtc.config import CompressionConfig
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.importance import ReceivedAttention
from vtc.models import resolve
from vtc.tokens import Layout, Segment, VisualTokens

TOWERS = ["qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_video", "qwen3_vl_video", "glm46v", "llava_onevision", "mistral3"]
TOWERS += ["idefics3", "gemma3", "paligemma"]


@functools.cache
def received_by_hand(name: str) -> list[Tensor]:
    """By image in prompt order, videos first as the zoo has them: what its tokens receive in the tower's last layer."""
    model, batch = get_model(name), batch_of(name)
    modalities = {}
    for modality, encode in encoders(model, batch).items():
        value = received_of(model, encode, -1)
        modalities[modality] = torch.cat([torch.einsum("npt,pt->n", s, value) for s in made_of(model, encode)])
    found = []
    for sample, images in zip(batch.samples, batch.images, strict=True):
        for columns in images:
            token = int(sample["input_ids"][0, columns[0]])
            names = {v: k for k, v in resolve(model)[1].placeholders.items()}
            modality = names[token] if len(modalities) > 1 else next(iter(modalities))
            found.append(modalities[modality][: len(columns)])
            modalities[modality] = modalities[modality][len(columns) :]
    assert not any(len(rest) for rest in modalities.values())
    return found


@pytest.mark.parametrize("name", TOWERS)
def test_fastervlm_where_there_is_no_cls(name: str) -> None:
    model, batch = get_model(name), batch_of(name)
    scores = received_by_hand(name)
    keep = by_sample(batch, [s.topk(max(1, round(0.4 * len(s)))).indices.sort().values for s in scores])
    for saliency in (None, "received"):
        with vtc.patch(model, FasterVLM(keep=0.4, saliency=saliency)) as handle, torch.no_grad():
            model(**batch)
        assert [[k.tolist() for k in own] for own in handle.last_keep] == [[k.tolist() for k in own] for own in keep]
    check(model, batch, FasterVLM(keep=0.4), continued(model, batch, keep))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3"])
def test_idpruner_and_todre(name: str) -> None:
    """The first pick is the token that receives most."""
    model, batch = get_model(name), batch_of(name)
    most = by_sample(batch, [[int(s.argmax())] for s in received_by_hand(name)])
    for method in (vtc.IDPruner(keep=1, importance=ReceivedAttention()), vtc.ToDRE(keep=1, pivot="received")):
        with vtc.patch(model, method) as handle, torch.no_grad():
            model(**batch)
        assert [[k.tolist() for k in own] for own in handle.last_keep] == most
        assert CompressionConfig.from_dict(CompressionConfig.of(method).to_dict()).build() == method


def test_compress_inputs_hears_the_same() -> None:
    model, batch = get_model("qwen2_5_vl"), batch_of("qwen2_5_vl")
    with vtc.patch(model, FasterVLM(keep=0.4)) as handle, torch.no_grad():
        model(**batch)
    if "mm_encoder_outputs" not in resolve(model)[1].spellings.base.parameters:
        pytest.skip("this release of transformers takes no features that were encoded ahead")
    short = vtc.compress_inputs(model, dict(batch), FasterVLM(keep=0.4))
    features = short["mm_encoder_outputs"]["image"].pooler_output
    whole = encoders(model, batch)["image"]()
    for kept, image, full in zip([k for own in handle.last_keep for k in own], features, whole, strict=True):
        torch.testing.assert_close(image, full[kept], rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- bare tensors

CROPS = Segment("crops", 4, 18, (2, 8), True, (1, 2), (0, 0), (0, 0, 0, 0, 1, 1, 1, 1))
CUT = Layout(22, (Segment("thumbnail", 0, 4, (2, 2)), CROPS))


def tokens(layout: Layout, received: Tensor) -> VisualTokens:
    features = torch.randn(1, layout.length, 6, generator=torch.Generator().manual_seed(0))
    return VisualTokens(features, (layout,), (0,), {"received": received[None]})


def test_todre_starts_in_the_thumbnail() -> None:
    received = torch.arange(22.0)
    found = asking.picks(vtc.ToDRE(keep=3, pivot="received"), tokens(CUT, received), (3,))
    assert int(found[0, 0]) == 3
    with pytest.raises(ValueError, match="none of 'cls', 'received', 'random'"):
        vtc.ToDRE(pivot="sent")


def test_globalcom2_by_received() -> None:
    """The crop that the thumbnail's share looks at keeps most; within it those that receive most."""
    received = torch.rand(22, generator=torch.Generator().manual_seed(1))
    received[:4] = torch.tensor([0.5, 2.0, 0.5, 1.0])  # the right half of the thumbnail
    method = vtc.GlobalCom2(keep=0.5, scores="received", tau=0.5)
    found = vtc.select(method, tokens(CUT, received).features[0], layout=CUT, signals={"received": received})
    newlines = set(CUT.newlines())
    columns = [(int(i) - 4) % 9 for i in found.index if int(i) >= 4 and int(i) not in newlines]
    sigma = torch.tensor([1.0, 3.0]).div(0.5).softmax(0)
    expected = [int(8 * float(0.5 * (1 + s - 0.5))) for s in sigma]
    assert [sum(c < 4 for c in columns), sum(c >= 4 for c in columns)] == expected == [2, 5]
    with pytest.raises(ValueError, match="none of None, 'logits', 'probabilities', 'received', 'distance'"):
        vtc.GlobalCom2(scores="sent")


@pytest.mark.parametrize("scores", ["received", None])
def test_globalcom2_on_onevision(scores: Any) -> None:
    model, batch = get_model("llava_onevision"), batch_of("llava_onevision")
    with vtc.patch(model, "globalcom2", keep=0.5, scores=scores) as handle, torch.no_grad():
        model(**batch)
    assert handle.method.scores == (scores or "distance")
