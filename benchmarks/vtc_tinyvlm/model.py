"""The architecture, the processor, and loading the shipped checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .questions import DIRECTIONS
from .scenes import COLOR_NAMES, PATCH, SHAPES, SIZE

CHECKPOINT = Path(__file__).parent / "checkpoint"
IMAGE_MEAN, IMAGE_STD = 0.45, 0.25
IMAGE_TOKENS = (SIZE // PATCH) ** 2

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(5)
_PLAIN = (
    "what", "color", "shape", "digit", "is", "are", "the", "a", "on", "object", "objects", "how", "many", "there", "?",
    "nothing", "yes", "no",
)  # fmt: skip
_RELATION = sorted({word for name in DIRECTIONS for word in name.split()})
VOCABULARY = {
    word: index
    for index, word in enumerate((*SPECIAL, *_PLAIN, *_RELATION, *COLOR_NAMES, *SHAPES, *(str(d) for d in range(10))))
}


def build_config() -> Any:
    """A LlavaConfig: CLIP ViT (5 layers, width 128) -> projector -> Llama (5 layers, width 192); 144 visual tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )


def build_model() -> Any:
    """A freshly initialised LlavaForConditionalGeneration (seed torch first)."""
    from transformers import GenerationConfig, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(build_config())
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, max_new_tokens=3, do_sample=False
    )
    return model


def build_processor() -> Any:
    """A LlavaProcessor of a word-level tokenizer and CLIP's Pillow image processor."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(SPECIAL))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def save(model: Any, directory: str | Path = CHECKPOINT, processor: Any = None) -> None:
    """Write model and processor (default: this model's). Weights are rounded to fp16, config says float32: a plain load
    computes in fp32.
    """
    import copy
    import json

    directory = Path(directory)
    copy.deepcopy(model).half().save_pretrained(directory)
    config_file = directory / "config.json"
    config = json.loads(config_file.read_text())
    for part in (config, config["vision_config"], config["text_config"]):
        part.pop("torch_dtype", None)
        part["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (processor or build_processor()).save_pretrained(directory)
    for file in directory.iterdir():  # safetensors writes 0600
        file.chmod(0o644)


def load(directory: str | Path = CHECKPOINT) -> tuple[Any, Any]:
    """The shipped model (eval mode, fp32) and its processor, through plain `from_pretrained`."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    return model, AutoProcessor.from_pretrained(directory)
