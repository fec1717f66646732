"""Chat templates for vLLM, without vLLM: what a server makes of them begins as what transformers makes of them."""

import json
import shlex
import shutil

import pytest
from transformers import AutoProcessor
from typer.testing import CliRunner

import vtc_tinyvlm
from vtc.cli import app
from vtc_vllm import chat, checkpoints

STRING = "{% for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}"
PARTS = "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"
REFUSING = "{{ raise_exception('nobody asks here') }}"


def checkpoint(path, template=None, begins=True, bos="<bos>"):
    """The shipped checkpoint with this template; its tokenizer begins a text with BOS, or not, or knows none."""
    folder = shutil.copytree(vtc_tinyvlm.CHECKPOINT, path / "model")
    tokenizer, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not begins:
        tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"post_processor": None}))
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": bos}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def ids(folder, template, content):
    """As vLLM makes them of a template, which adds nothing; and as transformers does with the checkpoint's own."""
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": content}]
    text = processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    theirs = processor.apply_chat_template([messages], tokenize=True, return_dict=True)["input_ids"][0]
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"], theirs


TEMPLATES = {
    "without": PARTS,
    "with": "{{ bos_token }}" + PARTS,
    "with its name": "<bos>" + PARTS,
    "for strings, without": STRING,
    "for strings, with": "{{ bos_token }}" + STRING,
    "as shipped": chat.SHIPPED,
}


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_prompt_begins_as_with_transformers(tmp_path, template, begins):
    folder = checkpoint(tmp_path, template, begins)
    content = "what ?" if "role" in template else [{"type": "text", "text": "what ?"}]
    ours, theirs = ids(folder, chat.instead(str(folder)) or template, content)
    assert ours == theirs
    assert ours.count(1) == int(begins or "bos" in template)


@pytest.mark.parametrize(
    ("template", "more"),
    [
        ("{{ bos_token }}" + PARTS, {}),
        (PARTS, {"begins": False}),
        (PARTS, {"begins": False, "bos": None}),
        (REFUSING, {}),
        (None, {}),
    ],
    ids=["writes it", "not wanted", "not known", "refuses", "none"],
)
def test_what_is_right_stays(tmp_path, template, more):
    assert chat.instead(str(checkpoint(tmp_path, template, **more))) is None


def test_templates_with_names_stay(tmp_path):
    """A client chooses among them."""
    folder = checkpoint(tmp_path, PARTS)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text(PARTS)
    assert chat.instead(str(folder)) is None


def test_a_folder_without_a_tokenizer(tmp_path):
    """The server says so."""
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert chat.instead(str(tmp_path)) is None


@pytest.mark.parametrize("model", ["tinyvlm", "tinyvlm-next"])
def test_the_shipped_models(tmp_path, model):
    checkpoints.write(tmp_path, model)
    template = (tmp_path / "chat_template.jinja").read_text()
    content = [{"type": "image"}, {"type": "text", "text": "what color is the circle ?"}]
    messages = [{"role": "user", "content": content}]
    tokenizer = AutoProcessor.from_pretrained(tmp_path).tokenizer
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert text == "<bos><image> what color is the circle ?"
    assert chat.instead(str(tmp_path)) is None


def test_serving_gives_a_template_where_one_is_needed(tmp_path):
    def given(*arguments):
        shown = CliRunner().invoke(app, ["serve", str(folder), "--dry-run", *arguments])
        words = shlex.split(shown.stdout)
        return [words[at + 1] for at, word in enumerate(words) if word == "--chat-template"]

    folder = checkpoint(tmp_path, PARTS)
    assert given() == ["{{ bos_token }}" + PARTS]
    assert given("--chat-template", "mine") == ["mine"]
    assert given("--chat_template=mine") == []
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + PARTS)
    assert given() == []
