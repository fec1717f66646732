"""Forks of the original LLaVA code, by a stand-in: what their seams may do, and what is refused."""

import functools

import pytest
import torch
import zoo
from llava_standin import PICTURE, TILE, Next, make
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

import vtc
from vtc.models import elsewhere, resolve

IDS = torch.tensor([[1, 5, PICTURE, 6, 7], [1, PICTURE, 8, 9, 10]])
GREEDY = {"do_sample": False, "max_new_tokens": 4}


def tiles(*counts):
    random = torch.Generator().manual_seed(5)
    return [torch.randn(n, 3, TILE, TILE, generator=random) for n in counts]


def refused(model, match, method="divprune"):
    """Patching refuses it, and touches nothing."""
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(vtc.UnsupportedModelError, match=match) as why:
        vtc.patch(model, method, keep=0.5)
    assert [dict(module.__dict__) for module in model.modules()] == before
    return str(why.value)


# ----------------------------------------------------------------------------------------------- NeXT, images and video


def test_a_fork_with_another_signature_is_found_by_its_seam():
    model = make()
    with vtc.patch(model, "fastervlm", keep=0.25) as p:
        both = model.generate(IDS, images=tiles(1, 1), modalities=["image", "image"], **GREEDY)
        keep = p.last_keep
        alone = [
            model.generate(IDS[[row]], images=tiles(1, 1)[row : row + 1], modalities=["image"], **GREEDY)
            for row in (0, 1)
        ]
    assert [len(k) for row in keep for k in row] == [4, 4]
    assert torch.equal(both, torch.cat(alone))


def test_a_batch_that_lost_rows_is_refused():
    """The original says nothing, and answers the first prompt only."""
    model = make()
    with (
        vtc.patch(model, "divprune", keep=0.25),
        pytest.raises(
            ValueError,
            match=r"2 rows went into Next.prepare_\w+, and 1 came out.*one for each row",
        ),
    ):
        model.generate(IDS, images=tiles(1, 1), **GREEDY)


@pytest.mark.parametrize(
    ("newline", "length", "newlines"),
    [
        ("no_token", 12, []),
        ("one_token", 13, [12]),
        ("frame", 15, [4, 9, 14]),
        ("grid", 18, [2, 5, 8, 11, 14, 17]),
    ],
)
def test_videos_are_frames(newline, length, newlines):
    model = make(newline=newline)
    with vtc.patch(model, "divprune", keep=0.5, newlines="keep") as p:
        model.generate(IDS[:1], images=tiles(3), modalities=["video"], **GREEDY)
        (layout,) = p.last_layouts[0]
        kept = p.last_keep[0][0].tolist()
    assert (layout.length, layout.newlines()) == (length, newlines)
    assert set(newlines) <= set(kept) < set(range(length))
    frames = layout.of_kind("frame")
    assert len(frames) == 3
    assert {frame.grid for frame in frames} == {(2, 2)}


def test_videos_side_by_side():
    """No column of a pooled frame is a patch alone: the entry of `images` tells where one video ends."""
    model = make()
    ids = torch.tensor([[1, PICTURE, PICTURE, 6]])
    with vtc.patch(model, "divprune", keep=3) as p:
        model.generate(ids, images=tiles(3, 2), modalities=["video", "video"], **GREEDY)
        assert [layout.length for layout in p.last_layouts[0]] == [13, 9]
    assert [len(k) for k in p.last_keep[0]] == [3, 3]


def test_a_method_for_videos_takes_them():
    model = make()
    with vtc.patch(model, "evs", keep=0.5) as p:
        model.generate(IDS[:1], images=tiles(4), modalities=["video"], **GREEDY)
    assert 0 < len(p.last_keep[0][0]) < 17


@pytest.mark.parametrize(("method", "signal"), [("fastervlm", "cls"), ("intower", "left")])
def test_pooled_frames_have_no_patches_to_look_at(method, signal):
    model = make()
    given = {"images": tiles(3), "modalities": ["video"]}
    with (
        vtc.patch(model, method, keep=0.5),
        pytest.raises(
            ValueError,
            match=rf"{method!r} goes by single patches of the vision tower \({signal}.*of several patches",
        ),
    ):
        model.generate(IDS[:1], **given, **GREEDY)


class MeansThatAreNumbers(Next):
    """Nine by nine means would be numbers of patches, too: a mean is told from a patch by the hash beside it."""

    def of_image(self, tiles):
        side = tiles.view(len(tiles), 4, 4, -1)
        return side[:, :3, :3].flatten(0, 2).view(-1, 3, 3, side.shape[-1]).mean((1, 2))


def test_a_mean_that_is_a_whole_number_is_no_patch():
    model = make(MeansThatAreNumbers)
    with vtc.patch(model, "fastervlm", keep=1), pytest.raises(ValueError, match="tokens of several patches"):
        model.generate(IDS[:1], images=tiles(1), **GREEDY)


def test_the_last_picture_stands_in_for_those_that_are_missing():
    """LLaVA-NeXT does so silently: side by side it is two pictures all the same, each with its budget."""
    model = make()
    ids = torch.tensor([[1, PICTURE, PICTURE, 6]])
    with vtc.patch(model, "divprune", keep=3) as p:
        model.generate(ids, images=tiles(1), **GREEDY)
    assert [len(k) for k in p.last_keep[0]] == [3, 3]
    assert torch.equal(*p.last_keep[0])


def test_pictures_side_by_side():
    model = make()
    ids = torch.tensor([[1, PICTURE, PICTURE, 6]])
    with vtc.patch(model, "divprune", keep=3) as p:
        model.generate(ids, images=tiles(1, 1), **GREEDY)
        assert [layout.length for layout in p.last_layouts[0]] == [17, 17]


def test_half_precision_does_not_round_the_numbers():
    model = make().half()
    model.model.vision_tower.half()
    with vtc.patch(model, "divprune", keep=0.25) as p:
        model.generate(IDS[:1], images=[one.half() for one in tiles(1)], **GREEDY)
    assert [s.kind for s in p.last_layouts[0][0].segments] == ["image", "newline"]


# ---------------------------------------------------------------------------------------------------------------- forks


class Rounds(Next):
    """Casts what it encoded to half precision: numbers would be rounded, and the mark beside them shows it."""

    def of_image(self, tiles):
        return super().of_image(tiles).to(torch.bfloat16).float()


class EncodesElsewhere(Next):
    """As HoliTom: pictures are encoded by a method of another name."""

    @functools.wraps(Next.prepare_inputs_labels_for_multimodal)
    def prepare_inputs_labels_for_multimodal(self, *args, **kwargs):
        self.encode_images, given = self.elsewhere, vars(self).get("encode_images")
        try:
            return super().prepare_inputs_labels_for_multimodal(*args, **kwargs)
        finally:
            del self.encode_images
            if given is not None:
                self.encode_images = given

    def elsewhere(self, tiles):
        return self.model.mm_projector(self.get_vision_tower()(tiles))


@pytest.mark.parametrize("fork", [Rounds, EncodesElsewhere])
def test_without_numbers_text_tells_pictures_apart(fork):
    model, plain = make(fork), make()
    with vtc.patch(model, "divprune", keep=5) as p, vtc.patch(plain, "divprune", keep=5) as q:
        found = model.generate(IDS[:1], images=tiles(1), **GREEDY)
        expected = plain.generate(IDS[:1], images=tiles(1), **GREEDY)
    if fork is EncodesElsewhere:
        assert torch.equal(found, expected)
        assert torch.equal(p.last_keep[0][0], q.last_keep[0][0])
    with vtc.patch(model, "fastervlm", keep=5), pytest.raises(ValueError, match="encodes without encode_images"):
        model.generate(IDS[:1], images=tiles(1), **GREEDY)
    with vtc.patch(model, "divprune", keep=5, newlines="keep"), pytest.raises(ValueError, match="reads the structure"):
        model.generate(IDS[:1], images=tiles(1), **GREEDY)
    ids = torch.tensor([[1, PICTURE, PICTURE, 6]])
    with (
        vtc.patch(model, "divprune", keep=5),
        pytest.raises(
            ValueError, match=r"row 0 asks for 2 pictures, and its visual tokens stand in 1 runs.*Put text between them"
        ),
    ):
        model.generate(ids, images=tiles(1, 1), **GREEDY)


@pytest.mark.parametrize("count", [7, 11])
def test_a_seam_that_returns_more_is_refused(count):
    """As DyCoke's (7 values) and FastVID's (11)."""

    class More(Next):
        @functools.wraps(Next.prepare_inputs_labels_for_multimodal)
        def prepare_inputs_labels_for_multimodal(self, *args, **kwargs):
            return (*super().prepare_inputs_labels_for_multimodal(*args, **kwargs), *[None] * (count - 6))

    model = make(More)
    with vtc.patch(model, "divprune", keep=0.5), pytest.raises(ValueError, match=f"returned {count} values.*returns 6"):
        model.prepare_inputs_labels_for_multimodal(IDS, None, None, None, None, tiles(1, 1), ["image"] * 2)


def test_a_seam_that_draws_lots_is_refused():
    class Draws(Next):
        calls = 0

        def of_image(self, tiles):
            Draws.calls += 1
            return super().of_image(tiles)[: -Draws.calls]

    model = make(Draws)
    with vtc.patch(model, "divprune", keep=0.5), pytest.raises(ValueError, match="depends on more than its arguments"):
        model.generate(IDS[:1], images=tiles(1), **GREEDY)


def test_random_positions_are_refused_in_training_alone():
    model = make(use_pos_skipping=True)
    with vtc.patch(model, "divprune", keep=0.5):
        model.generate(IDS[:1], images=tiles(1), **GREEDY)
        model.train()
        with pytest.raises(ValueError, match=r"config.use_pos_skipping moves positions at random.*set it to False"):
            model(IDS[:1], images=tiles(1), labels=IDS[:1].clamp(min=0))


def test_embeddings_beside_images_are_refused():
    model = make()
    with vtc.patch(model, "divprune", keep=0.5), pytest.raises(ValueError, match="would ignore the images"):
        model(inputs_embeds=torch.zeros(1, 3, 32), images=tiles(1))


def test_text_alone_is_no_accident(recwarn):
    model = make()
    with vtc.patch(model, "divprune", keep=0.5) as p:
        model(inputs_embeds=torch.zeros(1, 3, 32))
        model(torch.tensor([[1, 2, 3]]))
    assert p.last_keep is None
    assert not [w for w in recwarn if "nothing is pruned" in str(w.message)]


# ---------------------------------------------------------------------------------------- refused when they are patched


def test_what_has_no_seam_is_not_ours():
    with pytest.raises(vtc.UnsupportedModelError, match="it has no get_image_features"):
        vtc.patch(make().model, "divprune", keep=0.5)


def test_another_order_of_arguments_is_refused():
    class Mpt(Next):
        def prepare_inputs_labels_for_multimodal(self, input_ids, attention_mask, past_key_values, labels, images):
            raise AssertionError

    said = refused(make(Mpt), "takes input_ids, attention_mask, past_key_values, labels, images, not the token ids")
    assert "the position ids" in said


def test_no_tower_is_refused():
    model = make()
    model.model.vision_tower = None
    refused(model, "has no vision tower")


def test_an_unloaded_tower_is_refused():
    model = make()
    model.model.vision_tower.is_loaded = False
    refused(model, r"not loaded; model.get_vision_tower\(\).load_model\(\) first")


def test_a_config_that_the_original_refuses_is_refused():
    refused(
        make(tune_mm_mlp_adapter=True, mm_use_im_start_end=True), "sets tune_mm_mlp_adapter and mm_use_im_start_end"
    )


def test_alibi_is_refused():
    """MPT's blocks are no list of layers, and attend by distance, not by position ids."""
    model = make()
    model.model.blocks = model.model.layers
    del model.model.layers
    refused(model, "Base.*has no list of layers with rotary embeddings.*built as Llama")


def test_a_model_that_a_fork_prunes_already_is_refused(monkeypatch):
    model = make()
    monkeypatch.setattr(Next, "holitom", lambda self: None, raising=False)
    refused(model, "HoliTom has put code of its own into its class, and prunes by it")


def test_a_class_with_a_method_of_somebody_elses_is_refused(monkeypatch):
    def encode(self, tiles):
        raise AssertionError

    encode.__module__ = "token_compressor.vidcom2"
    model = make()
    monkeypatch.setattr(Next, "encode_images", encode)
    refused(model, "token_compressor.vidcom2 has put code of its own into its class")


def test_methods_in_front_of_a_projector_of_integers_are_refused():
    """4 bit: packed weights cannot be applied to new features here. Others never touch it."""
    model = make()
    model.model.mm_projector.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="acts in front of the projector"):
        vtc.patch(model, "prumerge", keep=0.5)
    vtc.patch(model, "divprune", keep=0.5).unpatch()


def test_methods_that_want_a_cls_token_need_one():
    model = make()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    siglip = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=TILE, patch_size=4))
    model.model.vision_tower.vision_tower, model.model.vision_tower.cls = siglip, 0
    with pytest.raises(ValueError, match="needs 'cls', which this Next cannot give"):
        vtc.patch(model, "todre", keep=0.5)
    with vtc.patch(model, "fastervlm", keep=0.25) as p:  # which takes what patches receive instead
        model.generate(IDS[:1], images=tiles(1), **GREEDY)
    assert len(p.last_keep[0][0]) == 4


def test_verify_says_that_it_needs_placeholders():
    with pytest.raises(ValueError, match="Next has none: it embeds prompts in a method of its own"):
        vtc.verify(make(), {"input_ids": IDS, "images": tiles(1, 1)})


# -------------------------------------------------------------------------------------------------------- the two hooks


def test_unpatch_leaves_nothing():
    model = make()
    before = [sorted(module.__dict__) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    p = vtc.patch(model, "fastv", keep=0.5)
    assert {"forward", "encode_images", "prepare_inputs_labels_for_multimodal"} <= set(vars(model))
    p.unpatch()
    assert [sorted(module.__dict__) for module in model.modules()] == before
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_any_package_may_know_a_model(monkeypatch):
    """By an entry point; the first that knows it counts, and those that do not say nothing."""
    asked = []

    class Entry:
        def __init__(self, found):
            self.found = found

        def load(self):
            return lambda model: (asked.append(model), self.found)[1]

    ours = resolve(make())
    monkeypatch.setattr(elsewhere, "_finders", lambda: [Entry(None).load(), Entry(ours).load(), Entry(1).load()])
    model = nn.Linear(1, 1)
    assert resolve(model) is ours
    assert asked == [model, model]
    asked.clear()
    resolve(zoo.get_model("llava"))  # a model of the usual build is nobody else's
    assert not asked


def test_embeddings_made_before_are_found_again():
    """As generate copies them for beams, and accelerate between devices."""
    model = make()
    with vtc.patch(model, "divprune", keep=4) as p, torch.no_grad():
        _, _, _, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
            IDS, None, None, None, None, tiles(1, 1), ["image"] * 2
        )
        model(inputs_embeds=embeds.clone())
        found = p.last_keep
        model(inputs_embeds=embeds.repeat_interleave(2, 0))
        assert [row[0].tolist() for row in p.last_keep] == [found[row][0].tolist() for row in (0, 0, 1, 1)]
        p.stage.last = None
        model(inputs_embeds=embeds + 1)
        assert p.last_keep is None


def test_the_cache_goes_by_the_name_that_the_model_knows():
    """The stand-in takes `past_key_values`, whatever this transformers says; dropped, answers would be wrong."""
    model = make()
    with vtc.patch(model, "divprune", keep=1.0):
        found = model.generate(IDS[:1], images=tiles(1), **GREEDY)
        ids, said = IDS[:1], []
        with torch.no_grad():
            for _ in range(GREEDY["max_new_tokens"]):
                said.append(int(model(ids, images=tiles(1), use_cache=False).logits[0, -1].argmax()))
                ids = torch.cat([ids, torch.tensor([[said[-1]]])], 1)
        with pytest.raises(TypeError, match="key_value_store"):
            model(IDS[:1], images=tiles(1), key_value_store=3)
        model(IDS[:1], images=tiles(1), key_value_store=None)
    assert found[0].tolist() == said
