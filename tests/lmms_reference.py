"""What the tests that run lmms-eval share: an evaluation of the scenes, the same questions without it, and a family."""

import transformers as tf
from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from zoo import models, parts

import vtc
import vtc_tinyvlm
from vtc_lmms_eval import scenes
from vtc_tinyvlm.evaluate import generate, prepare

QUESTIONS = 60


def model_args(folder, pruning, model="model"):
    return f"base=llava_hf,pretrained={folder / model},{pruning}"


def evaluate(folder, arguments, simple=False, limit=None, batch=1, task=scenes.TASK):
    return evaluator.simple_evaluate(
        model="vtc",
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), model_name="vtc"),
        batch_size=batch,
        device="cpu",
        limit=limit,
        force_simple=simple,
        log_samples=True,
    )


def answers(result, task=scenes.TASK):
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples]


def own_answers(method):
    """The same questions as benchmarks/accuracy.py asks them: in batches, through `vtc.patch`."""
    model, processor = vtc_tinyvlm.load()
    batches = prepare(vtc_tinyvlm.evaluation_questions(QUESTIONS), processor, 20)
    if method is None:
        return [text for batch in batches for text in generate(model, processor, batch)]
    with vtc.patch(model, method):
        return [text for batch in batches for text in generate(model, processor, batch)]


def write_tiny_qwen(folder):
    words = [f"w{i}" for i in range(parts.VOCAB)]
    special = {"<|endoftext|>": parts.PAD, "<|im_end|>": parts.EOS, "<unk>": 3, "<|image_pad|>": parts.IMAGE}
    special |= {"<|video_pad|>": parts.VIDEO, "<|vision_start|>": parts.START, "<|vision_end|>": parts.END}
    for word, index in special.items():
        words[index] = word
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(list(special))
    tokens = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    extra = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=extra, **tokens)
    template = (
        "{% for m in messages %}{% if m['content'] is string %} {{ m['content'] }}{% else %}{% for p in m['content'] %}"
        "{{ ' <|vision_start|> <|image_pad|> <|vision_end|>' if p['type'] == 'image' else ' ' + p['text'] }}"
        "{% endfor %}{% endif %}{% endfor %}"
    )
    patches = {"patch_size": 2, "merge_size": 2, "temporal_patch_size": 2}
    pictures, videos = tf.Qwen2VLImageProcessor(**patches), tf.Qwen2VLVideoProcessor(**patches)
    tf.Qwen2_5_VLProcessor(pictures, tokenizer, videos, chat_template=template).save_pretrained(folder)
    models.qwen2_5_vl().save_pretrained(folder)
