"""What a study needs of a model's configuration and tokenizer is checked when the model is taken in."""

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from coppice import models
from coppice.cli import single_jobs
from coppice.core import records
from coppice.core.errors import CheckpointError, CoppiceError, SettingsError
from coppice.models import dimensions, intake, kinds, tokenizing
from coppice.models.intake import Needs
from coppice.models.rows import Row, Segment

SCRIPTS = Path(models.__file__).parents[2]
BOTH = "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}"


def edit(folder, **changes):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder


@pytest.fixture
def without_eos(tiny_checkpoint):
    return edit(tiny_checkpoint(), eos_token=None)


def test_names_the_remedy_for_a_tokenizer_without_an_end(without_eos):
    with pytest.raises(SettingsError, match=r"has no end-of-sequence token.*models\.X\.eos_token.*--eos-token.*'<s>'"):
        intake.check(without_eos, Needs())
    assert intake.check(without_eos, Needs(eos_token="<s>"))["tokenizer"]["eos"] == "<s>"
    with pytest.raises(SettingsError, match=r"eos_token is '<end>', which is not a token"):
        intake.check(without_eos, Needs(eos_token="<end>"))


def test_trains_with_the_end_that_the_user_names(without_eos):
    row = Row([Segment("w5 w6", True)], True, True, False, {})
    kind = kinds.named("causal-lm")
    with pytest.raises(SettingsError, match=r"models\.X\.eos_token"):
        kind.examples([row], models.Source(str(without_eos)).reader(), 16, False)
    reader = models.Source(str(without_eos), eos_token="</s>").reader()
    assert kind.examples([row], reader, 16, False) == [[{"input_ids": [5, 6, 2], "labels": [5, 6, 2]}]]


def test_names_the_model_in_what_it_says(without_eos):
    with pytest.raises(SettingsError, match=r"^models\.Gemma: .*Set models\.Gemma\.eos_token"), intake.told_of("Gemma"):
        intake.check(without_eos, Needs())


def test_a_window_that_begins_with_bos_needs_a_tokenizer_that_has_one(tiny_checkpoint):
    folder = edit(tiny_checkpoint(), bos_token=None)
    assert intake.check(folder, Needs())["tokenizer"]["bos"] is None
    with pytest.raises(SettingsError, match=r"evaluate\.perplexity begins every window.*no BOS"):
        intake.check(folder, Needs(bos=True))


def with_bos(folder, template):
    """Let the tokenizer begin every text with BOS, and give it a chat template."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (BOTH, "both its chat template and its tokenizer add a BOS token; chats get one"),
        (f"<s> {BOTH}", "begins chats with two BOS tokens"),
        (BOTH.removeprefix("<s> "), "its chat template begins chats with none"),
        ("{{ raise_exception('no') }}", "does not accept a chat of one message"),
    ],
)
def test_says_how_chats_begin(tiny_checkpoint, template, words):
    folder = with_bos(tiny_checkpoint(), template)
    (notice,) = intake.check(folder, Needs(prompt="chat"))["notices"]
    assert words in notice
    assert not intake.check(folder, Needs(prompt="alpaca"))["notices"]


def test_a_chat_gets_one_bos_where_template_and_tokenizer_both_add_it(tiny_checkpoint):
    from coppice.data import prompts

    tokenizer = models.load_tokenizer(with_bos(tiny_checkpoint(), BOTH))
    form = prompts.Formatter("instruction", "chat", tokenizer)
    (row,) = form.rows({"instruction": "w5", "input": "", "output": "w6"}, "row 0")
    ((example,),) = kinds.named("causal-lm").examples([row], models.Reader(tokenizer), 16, False)
    assert example["input_ids"] == [1, 5, 6, 2]
    text, special = prompts.format_question("w5", "chat", tokenizer)
    assert tokenizer(text, add_special_tokens=special).input_ids == [1, 5]


def add_tokens(folder, **special):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(special) if special else tokenizer.add_tokens(["w128"])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_padding_token_without_a_row_is_harmless(tiny_checkpoint):
    folder = add_tokens(tiny_checkpoint(), pad_token="<new>")
    facts = intake.check(folder, Needs())
    assert facts["tokenizer"] == {"tokens": 129, "rows": 128, "bos": "<s>", "eos": "</s>", "pad": "<new>"}
    assert "no row in the embedding (128 rows), which is harmless as long as no text" in facts["notices"][0]
    source = models.Source(str(folder))
    model, tokenizer = models.load(source), source.tokenizer()
    models.check_vocabulary(model, tokenizer, folder)
    assert tokenizer.pad_token == "</s>"  # padding is looked up in the embedding, although its result is not used
    padded = tokenizer(["w5", "w6 w7"], padding=True, return_tensors="pt")
    assert torch.isfinite(model(**padded).logits).all()


def test_rejects_more_tokens_than_rows_by_name(tiny_checkpoint):
    folder = add_tokens(tiny_checkpoint())
    with pytest.raises(CheckpointError, match=r"1 of its tokens have none: 'w128' \(128\)"):
        intake.check(folder, Needs())


def test_the_token_that_ends_a_text_must_have_a_row(tiny_checkpoint):
    folder = add_tokens(tiny_checkpoint(), eos_token="<end>")
    with pytest.raises(CheckpointError, match=r"'<end>' \(128\)"):
        intake.check(folder, Needs())


def test_more_rows_than_tokens_are_normal(tiny_checkpoint):
    facts = intake.check(tiny_checkpoint("llama", vocab_size=192), Needs())
    assert facts["tokenizer"]["tokens"] == 128 and facts["tokenizer"]["rows"] == 192 and not facts["notices"]


def test_padding_with_the_end_trains_the_end(tiny_checkpoint):
    """Tools that mask padding by its id never teach such a model to stop."""
    tokenizer = models.load_tokenizer(edit(tiny_checkpoint(), pad_token="</s>"))
    row = Row([Segment("w5", False), Segment(" w6", True)], True, True, False, {})
    ((example,),) = kinds.named("causal-lm").examples([row], models.Reader(tokenizer), 16, False)
    assert example["labels"] == [-100, 6, 2]


# Sizes of other architectures

SIZES = {
    "llama": (dict(max_position_embeddings=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4), 64, 4),
    "gpt2": (dict(n_positions=64, n_embd=32, n_layer=3, n_head=4), 64, 4),
    "gptj": (dict(n_positions=64, n_embd=32, n_layer=3, n_head=4, rotary_dim=4), 64, 4),
    "mpt": (dict(max_seq_len=64, d_model=32, n_layers=3, n_heads=4), 64, 4),
    "bloom": (dict(hidden_size=32, n_layer=3, n_head=4), None, 4),
    "mamba": (dict(hidden_size=32, num_hidden_layers=3), None, None),
}


@pytest.mark.parametrize("architecture", SIZES)
def test_reads_the_sizes_of_an_architecture_under_its_own_names(architecture):
    given, context, heads = SIZES[architecture]
    config = AutoConfig.for_model(architecture, **given)
    for found in (dimensions.of(config), dimensions.of({**given, "model_type": architecture})):
        assert (found.context_length, found.hidden, found.layers, found.heads) == (context, 32, 3, heads)


def test_reads_the_sizes_of_the_text_part_of_a_model_that_also_sees():
    text = {"max_position_embeddings": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={"hidden_size": 16})
    for found in (dimensions.of(config), dimensions.of({"model_type": "gemma3", "text_config": text})):
        assert (found.context_length, found.hidden, found.layers, found.heads) == (512, 64, 4, 4)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("mamba")
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    config = AutoConfig.for_model("mamba", **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def unlimited(mamba, tiny_tokenizer, tmp_path):
    """Return the folder of a model whose configuration states no context length."""
    shutil.copytree(mamba, tmp_path / "mamba")
    tiny_tokenizer.save_pretrained(tmp_path / "mamba")
    return tmp_path / "mamba"


def test_asks_for_a_context_length_that_the_configuration_does_not_state(unlimited):
    with pytest.raises(SettingsError, match=r"how many tokens the model takes\. Set models\.X\.context_length"):
        intake.check(unlimited, Needs())
    assert intake.check(unlimited, Needs(context_length=96))["context_length"] == 96
    model = models.load(models.Source(str(unlimited), context_length=96))
    assert models.context_length(model) == 96
    with pytest.raises(SettingsError, match=r"models\.X\.context_length"):
        models.context_length(models.load(models.Source(str(unlimited))))


def test_a_length_above_the_configuration_s_is_refused_and_one_below_is_taken(tiny_checkpoint):
    folder = tiny_checkpoint()
    with pytest.raises(SettingsError, match=r"context_length is 512, but its config\.json says 256"):
        intake.check(folder, Needs(context_length=512))
    assert models.context_length(models.load(models.Source(str(folder), context_length=64))) == 64


def test_the_given_length_reaches_an_adapted_model_and_the_harness(unlimited):
    from peft import LoraConfig, get_peft_model

    from coppice.stages.evaluate import zero_shot

    source = models.Source(str(unlimited), context_length=96)
    model = models.load(source)
    assert zero_shot.language_model(model, source.tokenizer(), "lm-eval", 1).max_length == 96
    assert models.context_length(get_peft_model(model, LoraConfig(target_modules=["in_proj"]))) == 96


def test_what_the_user_says_of_a_model_changes_the_identity_of_its_results(tiny_checkpoint):
    source = models.Source("x")
    assert source.given() == {}  # so that results of earlier versions stay valid
    assert models.Source("x", context_length=8, eos_token="e").given() == {"context_length": 8, "eos_token": "e"}


def test_registering_a_model_writes_the_facts(tiny_checkpoint, tmp_path, without_eos):
    from coppice.core import records
    from coppice.data import fetching

    source = {"kind": "local", "path": str(tiny_checkpoint())}
    fetching.fetch_model("M", source, None, tmp_path / "model.json", needs=Needs())
    assert records.read(tmp_path / "model.json")["tokenizer"]["eos"] == "</s>"
    with pytest.raises(CoppiceError, match=r"models\.M: .*models\.M\.eos_token"):
        fetching.fetch_model("M", {"kind": "local", "path": str(without_eos)}, None, tmp_path / "m.json", needs=Needs())
    assert not (tmp_path / "m.json").exists()


def test_ends_of_the_case_that_users_reported(tmp_path):
    """A byte-level tokenizer with a BOS, an unknown and a padding token, and no EOS."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<|endoftext|>": 0, "<|pad|>": 1, "<|unk|>": 2, "a": 3}, unk_token="<|unk|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"bos_token": "<|endoftext|>", "pad_token": "<|pad|>", "unk_token": "<|unk|>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=r"Its special tokens are '<\|endoftext\|>'\."):
        tokenizing.check_end(models.load_tokenizer(tmp_path), Path("x"))


def import_as_candidate(path, folder, training):
    """Run the job that takes a checkpoint of a user into the study of model M."""
    records.write(folder / "dense.json", {"path": "/gone", "weights_fingerprint": "0" * 64})
    params = SimpleNamespace(
        row={"path": str(path), "given": {}}, needs=vars(Needs()), loading={}, training=training, status=None
    )
    job = SimpleNamespace(
        wildcards=SimpleNamespace(model="M", candidate="one"),
        log=[str(folder / "job.log")],
        threads=1,
        params=params,
        input=SimpleNamespace(model=folder / "dense.json"),
        output=[str(folder / "one/pruning.json")],
    )
    runpy.run_path(str(SCRIPTS / "import_candidate.py"), init_globals={"snakemake": job})


def test_names_layers_that_a_candidate_of_another_architecture_lacks(tiny_tokenizer, tmp_path):
    """Otherwise the fine-tuning refuses it, after it was scored and chosen."""
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    attention, q_proj = (single_jobs.settings({"target_modules": name}) for name in ("attention", "q_proj"))
    import_as_candidate(tmp_path / "gpt2", tmp_path / "first", attention)
    with pytest.raises(SystemExit):
        import_as_candidate(tmp_path / "gpt2", tmp_path / "second", q_proj)
    log = (tmp_path / "second/job.log").read_text()
    assert "models.M: finetune.lora.target_modules: 'q_proj' matches no linear layer of a GPT2LMHeadModel" in log
