"""vLLM itself with pruned models, against transformers with `vtc.patch`: answers, log-probabilities, keep-sets.

Engines run in this process, on the CPU, one at a time; the tests of one engine stand together. `nox -s vllm` runs them,
and beside them those of test_vllm_processes.py.
"""

import contextlib
import gc
import importlib.util
import os

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from vllm_reference import QUESTIONS, SURROUNDINGS, agree, answer, differ, reference, same_sets

import vtc
import vtc_tinyvlm
import vtc_tinyvlm_next

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: `nox -s vllm` runs these", allow_module_level=True)

os.environ |= SURROUNDINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from PIL import Image
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry

import vtc_vllm
from vtc.methods.globalcom2 import GlobalCom2
from vtc_vllm import checkpoints, positions
from vtc_vllm.globalcom2 import FixedGlobalCom2
from vtc_vllm.selection import Selector

pytestmark = pytest.mark.vllm
# vLLM looks at each architecture in a process of its own, for CUDA's sake: seconds each, which a CPU can be spared
registry._run_in_subprocess = lambda look: look()

GREEDY = SamplingParams(temperature=0, max_tokens=3, logprobs=1)


# -------------------------------------------------------------------------------------------------------------- engines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints in the layout that vLLM reads."""
    path = tmp_path_factory.mktemp("checkpoints")
    checkpoints.write(path / "tinyvlm", "tinyvlm")
    checkpoints.write(path / "tinyvlm-next", "tinyvlm-next")
    return path


@contextlib.contextmanager
def engine(path, architecture, entry, **settings):
    vtc_vllm.register()  # as the entry point does, were this an installed wheel
    usual = {
        "max_model_len": 512,
        "max_num_seqs": 16,
        "limit_mm_per_prompt": {"image": 4},
        "num_gpu_blocks_override": 256,
    }
    gc.freeze()  # vLLM collects garbage again and again as it starts, and would look through all of torch
    llm = LLM(
        str(path),
        dtype="float32",
        enforce_eager=True,
        seed=0,
        hf_overrides={"architectures": [architecture], "vtc": entry},
        **usual | settings,
    )
    try:
        yield llm
    finally:
        with contextlib.suppress(AttributeError):
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def prompt(text, images, keep=None, **more):
    asked = {"prompt": text, "multi_modal_data": {"image": images}, **more}
    return asked if keep is None else asked | {"mm_processor_kwargs": {"vtc_keep": keep}}


def ask(llm, prompts, sampling=GREEDY):
    """Token ids and the log-probability of the first, per prompt."""
    return [first(output) for output in llm.generate(prompts, sampling, use_tqdm=False)]


def first(output):
    """Of the first completion of a prompt, token ids and the log-probability of the first of them."""
    (done,) = output.outputs
    return list(done.token_ids), done.logprobs[0][done.token_ids[0]].logprob


@contextlib.contextmanager
def keep_sets():
    """What the engine's selector chose, in the order of encoding."""
    chosen, select = [], Selector.select

    def recording(self, modality, embeddings, *rest):
        found = select(self, modality, embeddings, *rest)
        chosen.extend(index.tolist() for index in found)
        return found

    Selector.select = recording
    try:
        yield chosen
    finally:
        Selector.select = select


# ------------------------------------------------------------------------------------------------------------ LLaVA-1.5


@pytest.fixture(scope="module")
def scenes():
    return vtc_tinyvlm.evaluation_questions(QUESTIONS)


@pytest.fixture(scope="module")
def llava(folder):
    """DivPrune at 0.25, prefix caching and chunked prefill as vLLM has them by default."""
    entry = {"method": "divprune", "keep": 0.25}
    with engine(folder / "tinyvlm", "VTCLlavaForConditionalGeneration", entry) as llm:
        yield llm


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25])
def test_answers_and_keep_sets_on_scenes(llava, scenes, keep):
    with keep_sets() as chosen:
        ours = ask(llava, [prompt(q.prompt, q.image, None if keep == 0.25 else keep) for q in scenes])
    theirs, kept = reference(vtc_tinyvlm, scenes, vtc.DivPrune(keep=keep))
    agree(ours, theirs)
    assert chosen == kept
    right = sum(vtc_tinyvlm.is_correct(text(llava, ids), q.answer) for (ids, _), q in zip(ours, scenes, strict=True))
    print(f"\nkeep={keep}: {len(ours)} answers and keep-sets equal, {right} right")


def text(llm, ids):
    return llm.get_tokenizer().decode(ids, skip_special_tokens=True)


def model_of(llm):
    """The engine's, which is in this process."""
    return llm.apply_model(lambda model: model)[0]


def test_the_first_prompts_were_watched(llava, scenes):
    """And found right."""
    ask(llava, [prompt(scenes[0].prompt, scenes[0].image)])
    assert model_of(llava)._watch.done


def test_positions_are_the_original_ones(llava, scenes):
    """Were they re-counted, as vLLM does by itself, the answers would be others."""
    ours = ask(llava, [prompt(q.prompt, q.image) for q in scenes[:34]])
    compact, _ = reference(vtc_tinyvlm, scenes[:34], vtc.DivPrune(keep=0.25), positions="compact")
    assert differ(ours, compact) > 0.05


def test_one_image_with_two_budgets_in_one_batch(llava, scenes):
    """Neither the processor's cache, the encoder's nor the prefixes' mix them up; nor with a name of the user's own."""
    some = [q for q in scenes[:8] for _ in range(2)]
    for uuids in ({}, {"multi_modal_uuids": {"image": ["mine"]}}):
        pick = some if not uuids else [scenes[0], scenes[0]]
        prompts = [prompt(q.prompt, q.image, keep, **uuids) for q, keep in zip(pick, [0.5, 8] * 8, strict=False)]
        ours = ask(llava, prompts)
        for offset, keep in enumerate((0.5, 8)):
            theirs, _ = reference(vtc_tinyvlm, pick[offset::2], vtc.DivPrune(keep=keep))
            agree(ours[offset::2], theirs)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_prefix_from_the_cache(llava, scenes, keep):
    """A block of 128 tokens comes from the cache: at 1.0 it ends inside the image, at 0.5 behind it."""
    q = scenes[0]
    prompts = [prompt("<image> " + "what color is the circle ? " * n + q.prompt[8:], q.image, keep) for n in (14, 20)]
    first, again = ask(llava, prompts), ask(llava, prompts)
    done = llava.generate(prompts, GREEDY, use_tqdm=False)
    assert min(o.num_cached_tokens for o in done) >= 128
    model, processor = vtc_tinyvlm.load()
    theirs = []
    with vtc.patch(model, vtc.DivPrune(keep=keep)):
        for p in prompts:
            theirs += answer(model, processor(images=q.image, text=p["prompt"], return_tensors="pt"))
    agree(first, theirs)
    agree(again, theirs)


def test_several_images_in_one_prompt(llava, scenes):
    images = [q.image for q in scenes[:3]]
    texts = ["<image> <image> <image> what color is the circle ?", "<image> what <image> is <image> the circle ?"]
    ours = ask(llava, [prompt(text, images, 0.25) for text in texts])
    model, processor = vtc_tinyvlm.load()
    with vtc.patch(model, vtc.DivPrune(keep=0.25)):
        theirs = [answer(model, processor(images=images, text=t, return_tensors="pt"))[0] for t in texts]
    agree(ours, theirs)


@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_a_chat_begins_as_a_prompt_does(llava, scenes, keep):
    """With BOS, which a chat template has to write for vLLM."""
    asked = [{"role": "user", "content": []} for _ in scenes]
    for message, q in zip(asked, scenes, strict=True):
        message["content"] = [{"type": "image_pil", "image_pil": q.image}, {"type": "text", "text": q.prompt[8:]}]
    kwargs = {"mm_processor_kwargs": {"vtc_keep": keep}, "use_tqdm": False}
    done = llava.chat([[message] for message in asked], GREEDY, **kwargs)
    theirs, _ = reference(vtc_tinyvlm, scenes, vtc.DivPrune(keep=keep))
    agree([first(output) for output in done], theirs)
    assert {tuple(output.prompt_token_ids[:2]) for output in done} == {(1, 4)}  # <bos>, <image>


def test_a_second_bos_is_dropped(llava, scenes):
    """A template wrote one, and an endpoint that adds another; a number of tokens beyond any is all of them."""
    ids = llava.get_tokenizer()(scenes[0].prompt).input_ids
    assert ids[0] == 1
    image = {"multi_modal_data": {"image": scenes[0].image}, "mm_processor_kwargs": {"vtc_keep": 10**400}}
    done = llava.generate([{"prompt_token_ids": i} | image for i in (ids, [1, *ids])], GREEDY, use_tqdm=False)
    assert done[0].prompt_token_ids == done[1].prompt_token_ids
    assert done[0].prompt_token_ids.count(4) == 144


BAD = [
    ({"mm_processor_kwargs": {"vtc_keep": 1.5}}, "keep=1.5"),
    ({"mm_processor_kwargs": {"vtc_keep": 0}}, "keep=0"),
    ({"mm_processor_kwargs": {"vtc_keep": "half"}}, "keep='half'"),
    ({"mm_processor_kwargs": {"vtc_keep": True}}, "keep=True"),
    ({"mm_processor_kwargs": {"vtc_kep": 0.5}}, "vtc_kep in mm_processor_kwargs"),
    ({"mm_processor_kwargs": {"images_kwargs": {"vtc_keep": 0.5}}}, "images_kwargs.vtc_keep in mm_processor_kwargs"),
    ({"prompt": "<image> <image> what ?"}, "2 image placeholders for 1 images"),
    ({"prompt": "what color ?"}, "0 image placeholders for 1 images"),
]


def test_bad_requests_are_refused_and_harm_nobody(llava, scenes):
    """200 requests, every other one bad, submitted by themselves as a server does."""
    refused, good = 0, []
    for i in range(200):
        q = scenes[i]
        if i % 2:
            change, said = BAD[i // 2 % len(BAD)]
            with pytest.raises(ValueError, match=said):
                llava.generate([prompt(q.prompt, q.image) | change], GREEDY, use_tqdm=False)
            refused += 1
        else:
            good += ask(llava, [prompt(q.prompt, q.image)])
    theirs, _ = reference(vtc_tinyvlm, scenes[0:200:2], vtc.DivPrune(keep=0.25))
    assert refused == 100
    agree(good, theirs)


@pytest.mark.parametrize("caching", [False, True])
def test_chunked_prefill(folder, scenes, caching):
    """24 tokens at a time: images are cut in the middle, and several prompts share a step."""
    settings = {"max_num_batched_tokens": 24, "max_num_seqs": 4, "enable_prefix_caching": caching}
    entry = {"method": "todre", "keep": 0.5}
    with engine(folder / "tinyvlm", "VTCLlavaForConditionalGeneration", entry, **settings) as llm:
        for keep in (0.5, 0.25):
            ours = ask(llm, [prompt(q.prompt, q.image, keep) for q in scenes[:34]])
            theirs, _ = reference(vtc_tinyvlm, scenes[:34], vtc.ToDRE(keep=keep))
            agree(ours, theirs)


@pytest.mark.parametrize("entry", [{"method": "idpruner"}, {"method": "divprune", "positions": "compact"}])
def test_other_methods_and_positions(folder, scenes, entry):
    with engine(folder / "tinyvlm", "VTCLlavaForConditionalGeneration", entry) as llm, keep_sets() as chosen:
        ours = ask(llm, [prompt(q.prompt, q.image) for q in scenes[:68]])
    method = {"idpruner": vtc.IDPruner, "divprune": vtc.DivPrune}[entry["method"]]()
    theirs, kept = reference(vtc_tinyvlm, scenes[:68], method, entry.get("positions", "original"))
    agree(ours, theirs)
    assert chosen == kept


def test_wrong_positions_end_the_engine(folder, scenes, monkeypatch):
    """With the first picture, before an answer."""
    filled = positions.filled

    def shifted(*given):
        now, delta = filled(*given)
        return now + 1, delta

    monkeypatch.setattr(positions, "filled", shifted)
    entry = {"method": "divprune"}
    with (
        engine(folder / "tinyvlm", "VTCLlavaForConditionalGeneration", entry) as llm,
        pytest.raises(RuntimeError, match="self-check of vtc found text at"),
    ):
        ask(llm, [prompt(scenes[0].prompt, scenes[0].image)])


# ----------------------------------------------------------------------------------------------------------- LLaVA-NeXT


@pytest.mark.parametrize("method", ["divprune", "globalcom2"])
def test_llava_next(folder, monkeypatch, method):
    """The shipped model of that family: crops and newlines; GlobalCom² with counts that are fixed, here and there."""
    asked = vtc_tinyvlm_next.evaluation_questions(34)
    monkeypatch.setattr(GlobalCom2, "_budgets", FixedGlobalCom2._budgets)
    settings = {"max_model_len": 1024, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    entry = {"method": method, "keep": 0.25}
    with engine(folder / "tinyvlm-next", "VTCLlavaNextForConditionalGeneration", entry, **settings) as llm:
        for keep in (0.5, 0.25):
            with keep_sets() as chosen:
                ours = ask(llm, [prompt(q.prompt, q.image, keep) for q in asked])
            theirs, kept = reference(vtc_tinyvlm_next, asked, vtc.methods.make_method(method, keep=keep), size=17)
            agree(ours, theirs)
            assert same_sets(chosen, kept)


# -------------------------------------------------------------------------------------------------------------- Qwen-VL

WORDS, EOS = 60, 1
MEDIA = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL = ("<|endoftext|>", "<|im_end|>", "<unk>", *MEDIA)
ONE = "<|vision_start|> <|image_pad|> <|vision_end|>"
CLIP = "<|vision_start|> <|video_pad|> <|vision_end|>"


def qwen(family, path):
    """A random checkpoint with its processor; weights large enough that a lost token shows."""
    words = [*SPECIAL, *(f"w{i}" for i in range(WORDS - len(SPECIAL)))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        unk_token=SPECIAL[2],
        extra_special_tokens={"image_token": SPECIAL[3], "video_token": SPECIAL[4]},
    )
    patches = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"size": {"shortest_edge": 256, "longest_edge": 65536}}
    pictures = tf.Qwen2VLImageProcessor(**patches, **limits)
    videos = tf.Qwen2VLVideoProcessor(**patches, **limits)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    common = {
        "vocab_size": WORDS, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024, "rope_parameters": rope,
        "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    tower = {"depth": 2, "num_heads": 2, "in_channels": 3, "patch_size": 8, "spatial_merge_size": 2,
             "temporal_patch_size": 2}  # fmt: skip
    ids = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    if family == "qwen2_5_vl":
        tower |= {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128, "window_size": 32,
                  "fullatt_block_indexes": [1], "tokens_per_second": 2}  # fmt: skip
        config = tf.Qwen2_5_VLConfig(vision_config=tower, text_config=common, **ids)
        cls, processor = tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLProcessor
    elif family == "qwen2_vl":
        tower |= {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
        config = tf.Qwen2VLConfig(vision_config=tower, text_config=common, **ids)
        cls, processor = tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLProcessor
    else:
        tower |= {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128,
                  "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
        rope |= {"mrope_interleaved": True, "mrope_section": [12, 10, 10]}
        common |= {"head_dim": 64, "num_hidden_layers": 3}
        processor, videos = tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor(**patches, **limits)
        if family == "qwen3_vl":
            config, cls = tf.Qwen3VLConfig, tf.Qwen3VLForConditionalGeneration
        else:
            common |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
                       "norm_topk_prob": True}  # fmt: skip
            config, cls = tf.Qwen3VLMoeConfig, tf.Qwen3VLMoeForConditionalGeneration
        config = config(vision_config=tower, text_config=common, **ids)
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                gain = 2.0 if "q_proj" in name or "k_proj" in name or "o_proj" in name else 1.0
                inputs = parameter.shape[-1] if "experts" in name else parameter[0].numel()
                parameter.normal_(0, gain * inputs**-0.5 if "embed_tokens" not in name else 1.0)
    model.generation_config = tf.GenerationConfig(eos_token_id=EOS, pad_token_id=0, do_sample=False)
    model.save_pretrained(path)
    if family == "qwen3_vl_moe":  # experts as the hub has them, inputs first
        weights = load_file(path / "model.safetensors")
        turned = {k: w.mT.contiguous() if ".experts." in k else w for k, w in weights.items()}
        save_file(turned, path / "model.safetensors", metadata={"format": "pt"})
    built = processor(pictures, tokenizer, videos, chat_template="{{ messages }}")
    built.save_pretrained(path)
    return model, built


def picture(width, height, seed):
    noise = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    big = torch.nn.functional.interpolate(noise[None], size=(height, width), mode="bilinear")[0]
    return Image.fromarray((big.permute(1, 2, 0) * 255).byte().numpy())


def architecture(model):
    return vtc_vllm.pruning_architecture([type(model).__name__])


@contextlib.contextmanager
def without_deepstack(model):
    """What the tower hands to the language model's first layers set to nothing."""
    hooks = [m.register_forward_hook(lambda *args: 0 * args[-1]) for m in model.model.visual.deepstack_merger_list]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def film():
    """Six frames, and what vLLM wants to know about them."""
    frames = np.stack([np.array(picture(64, 48, seed)) for seed in range(6)])
    about = {"fps": 4.0, "duration": 1.5, "total_num_frames": 6, "frames_indices": list(range(6)),
             "video_backend": "opencv", "do_sample_frames": False}  # fmt: skip
    return frames, about


@pytest.mark.parametrize(
    ("family", "method", "chunk"),
    [
        ("qwen2_5_vl", "divprune", 16),
        ("qwen2_vl", "idpruner", 16),
        ("qwen3_vl", "divprune", 16),
        ("qwen3_vl_moe", "idpruner", 256),
    ],
)
def test_qwen(tmp_path, family, method, chunk):
    """M-RoPE: wide and tall images, two in a prompt, in chunks."""
    model, processor = qwen(family, tmp_path)
    wide, tall = picture(96, 48, 0), picture(48, 112, 1)
    asked = [
        (f"w1 {ONE} w2 w3 w4", [wide]),
        (f"w1 {ONE} w2 {ONE} w3 w4", [tall, wide]),
        (f"{ONE} w5 w6 w7 w8 w9 w10", [tall]),
    ]
    given = [processor(images=images, text=text, return_tensors="pt") for text, images in asked]
    settings = {"max_num_batched_tokens": chunk, "max_num_seqs": 2, "max_model_len": 256}
    limits = {"limit_mm_per_prompt": {"image": 2, "video": 0}}
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=1)
    with engine(tmp_path, architecture(model), {"method": method, "keep": 0.5}, **settings, **limits) as llm:
        for keep in (1.0, 0.5, 0.25):
            with keep_sets() as chosen:
                ours = ask(llm, [prompt(t, images, keep) for t, images in asked], sampling)
            theirs, kept = [], []
            for inputs in given:
                with vtc.patch(model, vtc.methods.make_method(method, keep=keep)) as handle:
                    theirs += answer(model, inputs, 6)
                kept += [index.tolist() for sample in handle.last_keep for index in sample]
            agree(ours, theirs)
            assert same_sets(chosen, kept)
        assert model_of(llm)._watch.done
        with pytest.raises(ValueError, match="ends inside an image"):
            llm.generate([prompt("w1 <|vision_start|> <|image_pad|>", [wide])], sampling, use_tqdm=False)
        if family.startswith("qwen3"):
            with without_deepstack(model), vtc.patch(model, vtc.methods.make_method(method, keep=0.25)):
                assert differ(ours, [answer(model, inputs, 6)[0] for inputs in given]) > 0.02
            with pytest.raises(ValueError, match="1 video placeholders for 0 videos"):
                llm.generate([prompt(f"w1 {ONE} {CLIP} w2", [wide])], sampling, use_tqdm=False)
            clip = {"prompt": f"w1 {CLIP} w2", "multi_modal_data": {"video": [film()]}}
            with pytest.raises(ValueError, match="a time stands before each frame"):
                llm.generate([clip], sampling, use_tqdm=False)


def test_qwen_video(tmp_path):
    """A video is one budget over all frames; times follow its frame rate.

    Four frames a second: where a video's time is longer than the longer side of its grid, transformers 5 lets the text
    behind it begin within it, and vLLM behind it.
    """
    model, processor = qwen("qwen2_5_vl", tmp_path)
    frames, about = film()
    asked = f"w1 {CLIP} w2 w3 w4"
    settings = {"max_num_batched_tokens": 24, "max_num_seqs": 2, "max_model_len": 256}
    limits = {"limit_mm_per_prompt": {"image": 1, "video": 1}}
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=1)
    entry = {"method": "divprune", "keep": 0.5}
    name = "VTCQwen2_5_VLForConditionalGeneration"
    with engine(tmp_path, name, entry, **settings, **limits) as llm, keep_sets() as chosen:
        ours = ask(llm, [{"prompt": asked, "multi_modal_data": {"video": [(frames, about)]}}], sampling)
    known = {name: value for name, value in about.items() if name != "do_sample_frames"}
    inputs = processor(
        text=asked, videos=[frames], video_metadata=[tf.video_utils.VideoMetadata(**known)], do_sample_frames=False,
        return_tensors="pt",
    )  # fmt: skip
    with vtc.patch(model, vtc.DivPrune(keep=0.5)) as handle:
        theirs = answer(model, inputs, 6)
    agree(ours, theirs)
    assert chosen == [handle.last_keep[0][0].tolist()]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"method": "transprune"}, "between the layers"),
        ({"method": "todre", "options": {"stage2": True}}, "between the layers"),
        ({"method": "divprune", "keep": 1.5}, "keep=1.5"),
        ({"method": "divprun"}, "did you mean 'divprune'"),
        ({"method": "globalcom2"}, "thumbnail"),
        (None, "does not say how to prune"),
    ],
)
def test_refused_at_start_up(folder, entry, said):
    with pytest.raises(Exception, match=said), engine(folder / "tinyvlm", "VTCLlavaForConditionalGeneration", entry):
        pass


def test_a_keep_in_the_wrong_place_is_refused(folder):
    kwargs = {"mm_processor_kwargs": {"vtc_keep": 0.5}}
    with (
        pytest.raises(Exception, match="config's 'vtc' entry has a keep"),
        engine(folder / "tinyvlm", "VTCLlavaForConditionalGeneration", {"method": "divprune"}, **kwargs),
    ):
        pass


def test_an_entry_without_the_architecture_is_refused(folder):
    entry = {"method": "divprune"}
    with (
        pytest.raises(Exception, match="does not prune"),
        engine(folder / "tinyvlm", "LlavaForConditionalGeneration", entry),
    ):
        pass


def test_the_wrong_architecture_is_refused(folder):
    entry = {"method": "divprune"}
    with (
        pytest.raises(Exception, match="model_type is 'llava'"),
        engine(folder / "tinyvlm", "VTCLlavaNextForConditionalGeneration", entry),
    ):
        pass
