"""Models of the original LLaVA code (llava-torch), pruned, against the same by hand. `nox -s llava` runs these."""

import contextlib
import functools
import importlib.util

import pytest

if importlib.util.find_spec("llava") is None:
    pytest.skip("llava-torch is not installed: `nox -s llava` runs these", allow_module_level=True)

import llava_models as zoo
import llava_reference as by_hand
import torch
import transformers as tf
from llava_models import GREEDY, NEW_TOKENS, call, make
from release import CACHE

import vtc

pytestmark = [
    pytest.mark.llava,
    pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning:llava"),  # the original code's own
]
KINDS = ("flat", "anyres")
TOLERANCE = 2e-5
ROWS = [0, 1, 2, 3]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return make(kind)


@contextlib.contextmanager
def newer_words(model):
    """Lets the unpatched model generate with transformers 5.24: its forward pass gets the cache by its old name."""
    forward = model.forward

    @functools.wraps(forward)
    def call(*args, **kwargs):
        cache = kwargs.pop("cache", None)
        return forward(*args, **kwargs, **({} if cache is None else {"past_key_values": cache}))

    model.forward = call
    yield
    del model.forward


def unpatched(model, kind):
    with newer_words(model):
        return answers(model, kind)


def state(model):
    """All of a model that a patch could touch."""
    hooks = [
        {name: [*value] for name, value in vars(module).items() if "hook" in name and isinstance(value, dict)}
        for module in model.modules()
    ]
    return [sorted(vars(module)) for module in model.modules()], hooks, [type(module) for module in model.modules()]


def answers(model, kind, rows=ROWS, **options):
    return model.generate(**call(rows, kind), **(GREEDY | options))


def said(output):
    """Tokens [B, T] and logits [B, T, V]."""
    return output.sequences, torch.stack(output.logits, 1)


def check(model, kind, rows, keep, output, *, compact=False, after=0):
    """Tokens and logits of each row are those by hand."""
    tokens, logits = said(output)
    for at, row in enumerate(rows):
        with torch.no_grad():
            prompt = by_hand.prompt(model, row, kind)
            expected, scores = by_hand.greedy(model, prompt, keep[at], NEW_TOKENS, compact, after)
        assert tokens[at].tolist() == expected, row
        assert torch.allclose(logits[at], scores, atol=TOLERANCE), (row, (logits[at] - scores).abs().max())


def everything(model, kind):
    """Keep-sets that drop nothing."""
    return [[torch.arange(len(span)) for span in by_hand.prompt(model, row, kind).spans] for row in ROWS]


# -------------------------------------------------------------------------------------------------------- right answers


def test_the_reference_is_right_about_the_unpatched_model(model, kind):
    check(model, kind, ROWS, everything(model, kind), unpatched(model, kind))


def test_keep_everything_changes_no_bit(model, kind):
    plain = said(unpatched(model, kind))
    with vtc.patch(model, "divprune", keep=1.0) as p:
        same = said(answers(model, kind))
        assert [[len(k) for k in row] for row in p.last_keep] == [
            [len(k) for k in row] for row in everything(model, kind)
        ]
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


METHODS = {
    "divprune": {"keep": 0.25},
    "divprune-absolute": {"method": "divprune", "keep": 5},
    "divprune-newlines": {"method": "divprune", "keep": 0.25, "newlines": "keep"},
    "fastervlm": {"keep": 0.25},
    "scope": {"keep": 0.5},
    "cdpruner": {"keep": 0.5},
    "fastv": {"keep": 0.25},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_alone_in_a_batch_and_by_hand(model, kind, name, positions):
    options = {"method": name} | METHODS[name]
    if name == "fastv" and positions == "compact":
        with pytest.raises(ValueError, match="positions of its own"):
            vtc.patch(model, positions=positions, **options)
        return
    inside = 2 if name == "fastv" else 0
    with vtc.patch(model, positions=positions, **options) as p:
        batch = answers(model, kind)
        together = p.last_keep
        alone = []
        for row in ROWS:
            p.stage.last = None
            alone.append(said(answers(model, kind, [row])))
            assert [k.tolist() for k in together[row]] == [k.tolist() for k in (p.last_keep or [[]])[0]]
    assert [len(row) for row in together] == [1, 1, 2, 0]
    assert all(0 < len(k) < zoo.PATCHES * 5 for row in together for k in row)
    tokens, logits = said(batch)
    for row, (own_tokens, own_logits) in enumerate(alone):
        assert torch.equal(tokens[row], own_tokens[0])
        assert torch.allclose(logits[row], own_logits[0], atol=TOLERANCE)
    check(model, kind, ROWS, together, batch, compact=positions == "compact", after=inside)


@torch.no_grad()
def test_what_stays_is_what_the_method_picks_from_features_by_hand(model, kind):
    for row in ROWS[:3]:
        prompt = by_hand.prompt(model, row, kind)
        with vtc.patch(model, "divprune", keep=0.25) as p:
            answers(model, kind, [row])
            kept = p.last_keep[0]
        for span, found in zip(prompt.spans, kept, strict=True):
            expected = vtc.select("divprune", prompt.embeds[span.start : span.stop], keep=0.25).index
            assert torch.equal(found, expected)


@torch.no_grad()
def test_cls_attention_goes_the_way_of_the_patches(model, kind):
    """FasterVLM takes the highest, of the layer before the last one that the language model sees nothing of."""
    for row in ROWS[:3]:
        with vtc.patch(model, "fastervlm", keep=0.25) as p:
            answers(model, kind, [row])
            layer = p.stage.chooser.overheard[0].layer
            kept = p.last_keep[0]
        prompt = by_hand.prompt(model, row, kind)
        for picture, patches, found in zip(zoo.OWN[row], prompt.patches, kept, strict=True):
            cls = by_hand.cls_attention(model, picture, kind, layer)
            scores = torch.tensor([0.0 if patch is None else float(cls[patch]) for patch in patches])
            assert set(found.tolist()) == set(scores.topk(len(found)).indices.tolist())


@torch.no_grad()
def test_fastv_keeps_what_the_last_token_looks_at(model, kind):
    for row in ROWS[:3]:
        with vtc.patch(model, "fastv", keep=0.25) as p:
            answers(model, kind, [row])
            kept = p.last_keep[0]
        prompt = by_hand.prompt(model, row, kind)
        attention = by_hand.last_row(model, prompt, 1)
        for span, found in zip(prompt.spans, kept, strict=True):
            best = attention[span.start : span.stop].topk(len(found)).indices
            assert set(found.tolist()) == set(best.tolist())


def test_layouts_are_those_by_hand(model, kind):
    with vtc.patch(model, "divprune", keep=0.5) as p:
        answers(model, kind)
        layouts = p.last_layouts
    prompts = [by_hand.prompt(model, row, kind) for row in ROWS]
    assert [[o.newlines() for o in row] for row in layouts] == [prompt.newlines for prompt in prompts]
    if kind == "anyres":
        first, tall = layouts[0][0], layouts[2][1]
        assert [s.kind for s in first.segments] == ["thumbnail", "crops"]
        assert first.segments[1].crops == (2, 2)
        assert tall.segments[1].crops == (3, 1)
        assert [s.kind for s in layouts[1][0].segments] == ["image", "newline"]
        places = [patch for patch in prompts[0].patches[0][zoo.PATCHES :] if patch is not None]
        rows, columns = first.segments[1].crop_rows, first.segments[1].crop_columns
        assert [2 * r + c + 1 for r in rows for c in columns] == [tile for tile, _ in places]


def twin(model):
    """The same weights in transformers' own LLaVA, a family that other tests compare with pruning by hand."""
    vision = model.get_vision_tower().vision_tower
    config = tf.LlavaConfig(
        vision_config=vision.config.to_dict(),
        text_config=tf.LlamaConfig(**{k: v for k, v in model.config.to_dict().items() if k in LLAMA}).to_dict(),
        image_token_id=IMAGE[0],
        vision_feature_layer=-2,
    )
    other = tf.LlavaForConditionalGeneration(config).eval()
    inner, ours = other.model, model.model
    inner.vision_tower.load_state_dict(vision.state_dict())
    for new, old in ((inner.multi_modal_projector.linear_1, 0), (inner.multi_modal_projector.linear_2, 2)):
        new.load_state_dict(ours.mm_projector[old].state_dict())
    weights = {k: v for k, v in ours.state_dict().items() if not k.startswith(("vision_tower", "mm_projector"))}
    inner.language_model.load_state_dict(weights)
    other.lm_head.load_state_dict(model.lm_head.state_dict())
    other.generation_config.eos_token_id = None
    return other


IMAGE = [119] * zoo.PATCHES
LLAMA = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "pad_token_id", "tie_word_embeddings"),
}


@pytest.fixture(scope="module")
def twins():
    model = make(num_hidden_layers=5)
    return model, twin(model)


ELSEWHERE = {"globalcom2", "pixelprune", "mqt"}  # crops; Qwen's towers; a projector trained for it


@pytest.mark.parametrize("name", sorted({*vtc.list_methods()} - ELSEWHERE))
def test_every_method_does_what_it_does_in_transformers_own_llava(twins, name):
    model, other = twins
    ids = [
        [i for token in zoo.IDS[row] for i in ([119] * zoo.PATCHES if token == zoo.PICTURE else [token])]
        for row in (0, 1)
    ]
    width = max(map(len, ids))
    given = {
        "input_ids": torch.tensor([[zoo.PAD] * (width - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        "pixel_values": torch.cat(zoo.pictures("flat")[:2]),
    }
    options = {"layers": (1, 2, 3)} if name in ("pyramiddrop", "sparsevlm", "transprune") else {}
    with vtc.patch(other, name, keep=0.5, **options) as p:
        expected = other.generate(**given, **GREEDY)
        kept = p.last_keep
    with vtc.patch(model, name, keep=0.5, **options) as p:
        found = answers(model, "flat", [0, 1])
        assert [[k.tolist() for k in row] for row in p.last_keep] == [[k.tolist() for k in row] for row in kept]
    assert torch.allclose(said(found)[1], said(expected)[1], atol=TOLERANCE)
    assert torch.equal(found.sequences, expected.sequences[:, width:])


def test_patches_leave_inside_the_tower(model, kind):
    """As many of each tile; the columns of those that left go, and newlines stay."""
    with vtc.patch(model, "intower", keep=0.5) as p:
        tokens, logits = said(answers(model, kind))
        keep = p.last_keep
        for row in ROWS[:3]:
            alone, own = said(answers(model, kind, [row]))
            assert torch.equal(alone[0], tokens[row])
            assert torch.allclose(own[0], logits[row], atol=TOLERANCE)
    for row in ROWS[:3]:
        prompt = by_hand.prompt(model, row, kind)
        for patches, newlines, kept in zip(prompt.patches, prompt.newlines, keep[row], strict=True):
            assert set(newlines) <= set(kept.tolist())
            assert sum(patches[i] is not None and patches[i][0] == 0 for i in kept) == zoo.PATCHES // 2


def test_globalcom2_shares_out_budgets_by_crop():
    model = make("anyres")
    with vtc.patch(model, "globalcom2", keep=0.5) as p:
        output = answers(model, "anyres")
        keep = p.last_keep
    check(model, "anyres", ROWS, keep, output)


@pytest.mark.parametrize("name", ["fastv", "divprune"])
def test_beams(model, kind, name):
    """As beam search of transformers on one prompt whose embeddings were pruned by hand."""
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    with vtc.patch(model, name, keep=0.25) as p:
        found = model.generate(**call([2, 0], kind), **beams)
        keep = p.last_keep
    assert len(keep) == 6
    assert all(torch.equal(a, b) for a, b in zip(keep[0], keep[2], strict=True))
    with vtc.patch(model, name, keep=0.25):
        alone = model.generate(**call([0], kind), **beams)
    assert torch.equal(found[2:], alone)
    if name == "divprune":
        with torch.no_grad():
            prompt = by_hand.prompt(model, 0, kind)
            left = by_hand.columns_left(prompt, keep[3])
            assert torch.equal(beam_by_hand(model, prompt.embeds[left], torch.tensor(left), len(prompt.embeds)), alone)


def beam_by_hand(model, embeds, positions, after, width=3, steps=4, best=2):
    """Beam search without a cache: every beam is run whole, the sum of log-probabilities counts."""
    beams = [(0.0, [])]
    for _ in range(steps):
        ahead = []
        for score, tokens in beams:
            grown = torch.cat([embeds, model.model.embed_tokens.weight[tokens]]) if tokens else embeds
            places = torch.cat([positions, torch.arange(after, after + len(tokens))])
            scores = by_hand.run(model, grown, places)[-1].log_softmax(-1)
            top = scores.topk(2 * width)
            ahead += [(score + float(v), [*tokens, int(t)]) for v, t in zip(*top, strict=True)]
        beams = sorted(ahead, key=lambda beam: -beam[0])[:width]
    return torch.tensor([tokens for _, tokens in beams[:best]])


def test_a_static_cache(model, kind):
    with vtc.patch(model, "fastv", keep=0.25):
        dynamic = said(answers(model, kind))
        static = said(answers(model, kind, cache_implementation="static", disable_compile=True))
    assert torch.equal(dynamic[0], static[0])
    assert torch.allclose(dynamic[1], static[1], atol=TOLERANCE)


@torch.no_grad()
def test_a_later_turn_with_another_picture(model, kind):
    """On the pruned cache: positions count what was dropped, keys what is there."""
    first, second = by_hand.prompt(model, 0, kind), by_hand.prompt(model, 1, kind)
    given = [{"input_ids": g.pop("inputs"), **g} for g in (call([0], kind), call([1], kind))]
    for one in given:
        del one["attention_mask"]
    with vtc.patch(model, "divprune", keep=0.25) as p:
        model(**given[0], use_cache=True, past_key_values=(cache := tf.DynamicCache()))
        kept = p.last_keep[0]
        logits = model(**given[1], use_cache=True, past_key_values=cache).logits[0]
        left = [by_hand.columns_left(first, kept), by_hand.columns_left(second, p.last_keep[0])]
    embeds = torch.cat([first.embeds[left[0]], second.embeds[left[1]]])
    places = torch.tensor([*left[0], *(len(first.embeds) + c for c in left[1])])
    assert torch.allclose(logits, by_hand.run(model, embeds, places)[len(left[0]) :], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["divprune", "fastv"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradient(kind, name, side):
    model = make(kind, tokenizer_padding_side=side)
    given = call(ROWS, kind)
    ids, mask = given.pop("inputs"), given.pop("attention_mask")
    if side == "right":  # as collators for training do
        order = mask.argsort(dim=1, descending=True, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    labels = ids.masked_fill(mask == 0, -100)  # -200 among them: the code takes pictures out itself
    labels[ids == 1] = -100  # the first token of a row, which padding would be asked for
    with vtc.patch(model, name, keep=0.25) as p:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, **given).loss
        keep = p.last_keep
        loss.backward()
    after = 2 if name == "fastv" else 0
    found = [w.grad.clone() for w in model.model.mm_projector.parameters()]
    assert all(bool(g.abs().sum() > 0) for g in found)
    model.zero_grad()
    wrong = []
    for row in ROWS:
        prompt = by_hand.prompt(model, row, kind)
        left = by_hand.columns_left(prompt, keep[row])
        embeds = prompt.embeds if after else prompt.embeds[left]
        places = torch.arange(len(prompt.embeds)) if after else torch.tensor(left)
        logits = by_hand.run(model, embeds, places, after or None, left)
        wanted = [prompt.text[c] for c in left]
        wrong += [-logits[i].log_softmax(-1)[t] for i, t in enumerate(wanted[1:]) if t is not None]
    expected = torch.stack(wrong).mean()
    assert torch.allclose(loss, expected, atol=TOLERANCE)
    expected.backward()
    for gradient, weight in zip(found, model.model.mm_projector.parameters(), strict=True):
        assert torch.allclose(gradient, weight.grad, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------ on and off, and twice


def test_unpatch_leaves_nothing(model, kind):
    before, plain = state(model), said(unpatched(model, kind))
    p = vtc.patch(model, "fastervlm", keep=0.25)
    with pytest.raises(ValueError, match="patched already"):
        vtc.patch(model, "divprune", keep=0.5)
    answers(model, kind)
    p.unpatch()
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(plain, said(unpatched(model, kind)), strict=True))
    with vtc.patch(model, "divprune", keep=0.25) as p:
        first = said(answers(model, kind))
    with vtc.patch(model, "divprune", keep=0.25):
        again = said(answers(model, kind))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert state(model) == before


def test_two_models_at_once():
    one, two, other = make("flat"), make("flat"), make("anyres")
    plain = said(unpatched(two, "flat"))
    with vtc.patch(one, "divprune", keep=0.25) as p, vtc.patch(other, "fastv", keep=0.5) as q:
        a = answers(one, "flat")
        b = answers(other, "anyres")
        assert all(torch.equal(x, y) for x, y in zip(plain, said(unpatched(two, "flat")), strict=True))
        keeps = p.last_keep, q.last_keep
    check(one, "flat", ROWS, keeps[0], a)
    check(other, "anyres", ROWS, keeps[1], b, after=2)


def test_mistral():
    model = make("flat", "mistral", sliding_window=None)
    with vtc.patch(model, "divprune", keep=0.25) as p:
        output = answers(model, "flat")
        keep = p.last_keep
    check(model, "flat", ROWS, keep, output)


# ---------------------------------------------------------------------------------------------------------------- traps


def test_the_cache_keeps_its_place():
    """transformers 5.24 hands it over under a name that the original forward pass does not have."""
    model = make()
    renamed = pytest.raises(TypeError, match="unexpected keyword argument 'cache'")
    with renamed if CACHE == "cache" else contextlib.nullcontext():
        answers(model, "flat")
    with vtc.patch(model, "divprune", keep=1.0):
        output = answers(model, "flat")
    check(model, "flat", ROWS, everything(model, "flat"), output)


def test_another_unknown_word_is_refused():
    model = make()
    with vtc.patch(model, "divprune", keep=0.5):
        given = call([0], "flat")
        given = {"input_ids": given.pop("inputs"), **given}
        model(**given, kv_store=None)
        with pytest.raises(TypeError, match="kv_store"):
            model(**given, kv_store=3)


def test_a_text_without_a_picture_eats_one(kind, model):
    """The fourth prompt is text, and one of `images` goes to it: the pictures behind it are still the right ones."""
    rows = [3, 0, 2]
    with vtc.patch(model, "fastervlm", keep=0.25) as p:
        output = answers(model, kind, rows)
        keep = p.last_keep
    check(model, kind, rows, keep, output)


def test_a_prompt_of_one_picture_alone_is_left_alone(model, kind):
    """The original takes one column for a later step."""
    with vtc.patch(model, "divprune", keep=0.25), pytest.raises(IndexError):
        model(input_ids=torch.tensor([[zoo.PICTURE]]), images=zoo.pictures(kind)[:1], image_sizes=zoo.SIZES[:1])


def test_a_limit_that_cuts_before_pruning_is_told():
    model = make(tokenizer_model_max_length=12)
    with vtc.patch(model, "divprune", keep=0.25) as p:
        with pytest.warns(UserWarning, match=r"cut row 0 at config.tokenizer_model_max_length=12"):
            answers(model, "flat", [0])
        assert p.last_layouts[0][0].length == 9
        assert len(p.last_keep[0][0]) == 2
    model.config.tokenizer_model_max_length = 23  # just enough
    with vtc.patch(model, "divprune", keep=0.25) as p:
        output = answers(model, "flat", [0])
        keep = p.last_keep
    check(model, "flat", [0], keep, output)


def test_padding_on_the_right_is_told_where_nothing_is_trained():
    model = make(tokenizer_padding_side="right")
    warned = pytest.warns(UserWarning, match="tokenizer_padding_side = 'left'")
    with vtc.patch(model, "divprune", keep=0.25), warned:
        answers(model, "flat")


def test_padding_without_a_mask_is_no_text():
    """The original hands back no mask where it was given none, and pads rows with zeros all the same."""
    model = make()
    given = call([0, 1], "flat")
    given["inputs"] = torch.tensor([[*zoo.IDS[0][:6]], [*zoo.IDS[1]]])
    del given["attention_mask"]
    given["inputs"][1, -1] = zoo.PICTURE
    given["images"].append(given["images"][0])
    with vtc.patch(model, "divprune", keep=0.25) as p:
        tokens, _ = said(model.generate(**given, **GREEDY))
        keep = p.last_keep
        alone, _ = said(model.generate(given["inputs"][:1], images=given["images"][:1], **GREEDY))
    assert len(keep[1]) == 2
    assert torch.equal(tokens[0], alone[0])


def test_gaps_in_positions_are_no_packed_samples():
    """Scoring without a mask and without a cache: gaps must not be taken for ends of samples."""
    model = make()
    given = call([0], "flat")
    with vtc.patch(model, "divprune", keep=0.25) as p, torch.no_grad():
        logits = model(given["inputs"], images=given["images"], use_cache=False).logits[0]
        keep = p.last_keep[0]
        prompt = by_hand.prompt(model, 0, "flat")
    left = by_hand.columns_left(prompt, keep)
    with torch.no_grad():
        expected = by_hand.run(model, prompt.embeds[left], torch.tensor(left))
        assert torch.allclose(logits, expected, atol=TOLERANCE)
        near = torch.tensor([left[0], *[c + 1 for c in left[1:]]])  # negative control: positions make a difference
        assert not torch.allclose(expected, by_hand.run(model, prompt.embeds[left], near), atol=1e-3)


@pytest.mark.parametrize("wrong", ["swapped", "rolled", "blind"])
def test_the_reference_would_notice(wrong):
    """Negative controls: other positions, other tokens, no padding mask."""
    model = make()
    with vtc.patch(model, "divprune", keep=0.25) as p:
        _, logits = said(answers(model, "flat", [0]))
        keep = p.last_keep[0]
    with torch.no_grad():
        prompt = by_hand.prompt(model, 0, "flat")
        left = by_hand.columns_left(prompt, keep)
        places = torch.tensor(left)
        embeds = prompt.embeds[left]
        if wrong == "swapped":
            places = places.clone()
            places[[3, 6]] = places[[6, 3]]
        elif wrong == "rolled":
            embeds = prompt.embeds[by_hand.columns_left(prompt, [(keep[0] + 1) % zoo.PATCHES])]
        else:
            embeds, places = torch.cat([embeds.new_zeros(2, 48), embeds]), torch.cat([torch.zeros(2).long(), places])
        assert not torch.allclose(logits[0, 0], by_hand.run(model, embeds, places)[-1], atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_goes_by_placeholders_says_so(model):
    with pytest.raises(vtc.UnsupportedModelError, match="LlavaLlamaForCausalLM embeds prompts in a method of its own"):
        vtc.estimate(model, (336, 336), method="divprune", keep=0.5)
    with pytest.raises(vtc.UnsupportedModelError, match=r"a config of 'llava' \(LlavaConfig.*judges the loaded model"):
        vtc.estimate(model.config, (336, 336), method="divprune", keep=0.5)
    with pytest.raises(NotImplementedError, match=r"use vtc.patch\(model, ...\) and model.generate\(\)"):
        vtc.compress_inputs(model, {}, "divprune", keep=0.5)


def test_an_unloaded_tower_is_refused():
    model = make(load=False)
    before = state(model)
    with pytest.raises(vtc.UnsupportedModelError, match=r"not loaded; model.get_vision_tower\(\).load_model\(\) first"):
        vtc.patch(model, "divprune", keep=0.25)
    assert state(model) == before


def test_embeddings_beside_images_are_refused():
    model = make()
    with vtc.patch(model, "divprune", keep=0.25):
        with pytest.raises(NotImplementedError):  # the original's own
            model.generate(torch.tensor([zoo.IDS[0]]), images=zoo.pictures("flat")[:1], inputs_embeds=torch.zeros(1))
        with pytest.raises(ValueError, match="would ignore the images"):
            model(inputs_embeds=torch.zeros(1, 4, 48), images=zoo.pictures("flat")[:1])


@pytest.mark.parametrize("value", [-1, -101, 120])
def test_labels_that_are_no_tokens_are_refused(value):
    model = make()
    given = call([0], "flat")
    labels = given["inputs"].clone()
    labels[0, -1] = value
    with vtc.patch(model, "divprune", keep=0.25), pytest.raises(ValueError, match=f"labels have the value {value}"):
        model(input_ids=given["inputs"], images=given["images"], labels=labels)


def test_methods_for_videos_leave_pictures_whole(model, kind):
    """As in every other family: the tiles of a picture are not taken for frames."""
    with vtc.patch(model, "fastvid", keep=0.25) as p:
        answers(model, kind)
        assert [[len(k) for k in row] for row in p.last_keep] == [
            [len(k) for k in row] for row in everything(model, kind)
        ]


def test_a_cls_token_among_the_tokens():
    """`select_feature="cls_patch"`: it stands in front of the patches of a tile, and scores nothing. (With crops the
    original asserts a square number of patches.)
    """
    kind = "flat"
    model = make(mm_vision_select_feature="cls_patch")
    with vtc.patch(model, "fastervlm", keep=4) as p:
        answers(model, kind, [0])
        kept = p.last_keep[0][0]
        layer = p.stage.chooser.overheard[0].layer
    with torch.no_grad():
        cls = by_hand.cls_attention(model, 0, kind, layer)[0]
    assert set(kept.tolist()) == set((cls.topk(4).indices + 1).tolist())
