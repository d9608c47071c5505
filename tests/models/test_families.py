"""Every family that a profile serves: `vllm serve` and vllm.LLM against the recipe of its model card.

Within 1e-4 in float32. The checkpoints are tiny, seeded and of the family's architecture. One server and one engine
start a family, at the same time, all texts in them.
"""

import json
import shutil
import subprocess
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import library
import pytest
import tiny_hub_models
import tiny_models
from conftest import KIT, free_port, http, kit_environment, run_kit

from rerank_kit.engine.machine import Machine
from rerank_kit.engine.plan import plan_engine
from rerank_kit.models.card_prompts import BGE_TASK, PROMPT_IDS
from rerank_kit.models.checkpoint import Checkpoint, read_checkpoint
from rerank_kit.models.given import for_reference
from rerank_kit.models.library import FOLDER as LIBRARY
from rerank_kit.models.pair import Pair
from rerank_kit.models.profiles import PROFILE_DIR, all_profiles, find_profile, load_profiles
from rerank_kit.models.reference import _chat_ids, reference_scores
from rerank_kit.models.settled import settle
from rerank_kit.offline.prompts import PairEncoder
from rerank_kit.serving import check
from rerank_kit.settings import ConfigError, get_config

TEXTS = [
    ("What is the capital of China?", "The capital of China is Beijing."),
    ("中国的首都是哪里？", "中国的首都是北京。"),
    ("emoji 🚀👩‍👩‍👧", "flags 🇨🇳 and 👍🏽 and ☃️"),
    ("", ""),
    ("empty document", ""),
    ("", "empty query"),
    ("  edges  ", "  spaces at both edges  "),
    ("lines", "line one\nline two\r\nline three"),
    ("code", "if (a <| b) { x |> f } <think> </think> <|not_a_token|> &lt;b&gt; {{ jinja }} {% raw %}"),
    ("e\u0301 decomposed", "Å ﬁ ② ½ \u200b\u00a0\ufeff"),
    ("yes", "no"),
    ("long document", "Gravity attracts bodies. 引力 " * 150),
]
# vllm_usage.py cuts ids, the server text: a cut inside a character of several tokens is not the reference's there.
ASCII_LONG = ("long document", "Gravity attracts bodies. " * 200)
LONG_QUERY = ("Gravity attracts bodies. " * 150, "short")
QWEN_CONTROL = (
    ("a <|im_end|>\n<|im_start|>assistant", "b <|im_end|><|endoftext|><|fim_prefix|>"),
    ("a <| im_end|>\n<| im_start|>assistant", "b <| im_end|><| endoftext|><| fim_prefix|>"),
)
GEMMA_CONTROL = (
    ("a <eos> <start_of_turn>user", "b<bos> <unused98><end_of_turn> <mask>"),
    ("a < eos> < start_of_turn>user", "b< bos> < unused98>< end_of_turn> < mask>"),
)


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint (maker and folder name), the profile that must be found, and what its texts need."""

    make: callable
    folder: str
    profile: str
    max_length: int
    texts: tuple = tuple(TEXTS)
    # Control tokens spelled in a pair, and the same pair as the template breaks their spelling.
    control: tuple | None = None
    # Values written into config.json.
    config: tuple = ()
    # Also by a real server; off where only the checkpoint's settings differ from a family that is served.
    online: bool = True
    # Settings beside the model's.
    settings: tuple = ()


ENCODER_TEXTS = (*TEXTS, LONG_QUERY, ("a [SEP] </s> <s> b", "[CLS] <mask> [MASK] d"))
MINILM = (("sbert_ce_default_activation_function", "torch.nn.modules.linear.Identity"),)


def seq_cls(folder: Path) -> Path:
    return tiny_models.qwen3_seq_cls(folder, tiny_models.qwen3_reranker(folder.parent / "Qwen3-Reranker-0.6B"))


def zerank1(folder: Path) -> Path:
    """zerank-1: config.json names code that only changes predict()."""
    tiny_models.zerank2(folder)
    shutil.rmtree(folder / "1_LogitScore")
    (folder / "modules.json").unlink()
    code = {"AutoConfig": "modeling_zeranker.ZEConfig"}
    return tiny_models.set_config(folder, auto_map=code, model_type="zeroentropy")


def own_template(folder: Path) -> Path:
    """A Qwen3 fine-tune by sentence-transformers with a prompt of its own."""
    found = library.checkpoints_of(folder.parent / "library", ("own_template",))[0]
    return shutil.copytree(found, folder)


def untied(folder: Path) -> Path:
    return tiny_models.qwen3_reranker(folder, tied=False)


def qwen3_vl_untied(folder: Path) -> Path:
    return tiny_hub_models.qwen3_vl_reranker(folder, tied=False)


FAMILIES = {
    # Tied, as the 0.6B and 4B models: tests/serving/test_parity.py.
    # The 8B model has an own lm_head; vLLM 0.11.1 lost it and scored 0.5 for everything.
    "qwen3_untied": Family(untied, "Qwen3-Reranker-8B", "qwen3_reranker", 512, control=QWEN_CONTROL),
    "qwen3_seq_cls": Family(
        seq_cls, "Qwen3-Reranker-0.6B-seq-cls", "qwen3_reranker_seq_cls", 512, control=QWEN_CONTROL
    ),
    "bert": Family(tiny_models.bert_cross_encoder, "bert-reranker", "cross_encoder", 256, ENCODER_TEXTS),
    "xlm_roberta": Family(
        tiny_models.xlm_roberta_cross_encoder, "bge-reranker-v2-m3", "cross_encoder", 256, ENCODER_TEXTS
    ),
    "modernbert": Family(
        tiny_models.modernbert_cross_encoder,
        "gte-reranker-modernbert-base",
        "cross_encoder",
        256,
        ENCODER_TEXTS,
    ),
    # Trained by transformers' Trainer, which writes problem_type; a sigmoid all the same.
    "bert_regression": Family(
        tiny_models.bert_cross_encoder,
        "bert-reranker",
        "cross_encoder",
        256,
        ENCODER_TEXTS,
        config=(("problem_type", "regression"),),
        online=False,
    ),
    "bert_identity": Family(
        tiny_models.bert_cross_encoder,
        "ms-marco-MiniLM",
        "cross_encoder",
        256,
        ENCODER_TEXTS,
        config=MINILM,
        online=False,
    ),
    "mxbai": Family(tiny_models.mxbai_rerank_v2, "mxbai-rerank-base-v2", "mxbai_rerank_v2", 640, control=QWEN_CONTROL),
    "bge_gemma": Family(
        tiny_models.bge_reranker_v2_gemma, "bge-reranker-v2-gemma", "bge_reranker_v2_gemma", 512, control=GEMMA_CONTROL
    ),
    "bert_embedding": Family(tiny_models.bert_embedding, "bge-small-en", "embedding", 256, ENCODER_TEXTS, online=False),
    "xlm_roberta_embedding": Family(
        tiny_models.xlm_roberta_embedding, "multilingual-e5-small", "embedding", 256, ENCODER_TEXTS
    ),
    "qwen3_embedding": Family(
        tiny_models.qwen3_embedding, "Qwen3-Embedding-0.6B", "embedding", 256, (*TEXTS, LONG_QUERY)
    ),
    "zerank2": Family(tiny_models.zerank2, "zerank-2", "zerank2", 512, control=QWEN_CONTROL),
    # The same head and prompt; what differs is how its folder is served.
    "zerank1": Family(zerank1, "zerank-1-small", "zerank1", 512, control=QWEN_CONTROL, online=False),
    "own_template": Family(own_template, "my-ranker", "qwen3_reranker", 512, control=QWEN_CONTROL),
    "jina": Family(
        tiny_hub_models.jina_reranker_v2, "jina-reranker-v2-base-multilingual", "jina_reranker_v2", 256, ENCODER_TEXTS
    ),
    "gte": Family(
        tiny_hub_models.gte_multilingual_reranker,
        "gte-multilingual-reranker-base",
        "gte_multilingual_reranker",
        256,
        ENCODER_TEXTS,
    ),
    # vLLM's module of Qwen3-VL imports torchvision, which the CPU build leaves out.
    "qwen3_vl": Family(
        tiny_hub_models.qwen3_vl_reranker, "Qwen3-VL-Reranker-2B", "qwen3_vl_reranker", 512, control=QWEN_CONTROL
    ),
    "qwen3_vl_untied": Family(
        qwen3_vl_untied, "Qwen3-VL-Reranker-8B", "qwen3_vl_reranker", 512, control=QWEN_CONTROL, online=False
    ),
}
MISTRAL_CONTROL = (
    ("a </s> [INST] user", "b<s> [control_9][/INST] <unk>"),
    ("a < /s> [ INST] user", "b< s> [ control_9][ /INST] < unk>"),
)
LLAMA3_CONTROL = (
    ("a <|eot_id|> <|start_header_id|>user", "b<|begin_of_text|><|end_of_text|>"),
    ("a <| eot_id|> <| start_header_id|>user", "b<| begin_of_text|><| end_of_text|>"),
)
FAMILIES |= {
    # The document before the query: a long query is cut where no document fits beside it.
    "ctxl": Family(
        tiny_hub_models.ctxl_rerank_v2,
        "ctxl-rerank-v2-instruct-multilingual-1b",
        "ctxl_rerank_v2",
        256,
        (*TEXTS, LONG_QUERY),
        control=QWEN_CONTROL,
    ),
    "ctxl_mistral": Family(
        tiny_hub_models.ctxl_rerank_v2_mistral,
        "ctxl-rerank-v2-instruct-multilingual-6b",
        "ctxl_rerank_v2_mistral",
        258,  # where the server's cut of ASCII_LONG falls between two words: the rest of one has other tokens alone
        (*TEXTS, LONG_QUERY),
        control=MISTRAL_CONTROL,
    ),
    "llama_nemotron": Family(
        tiny_hub_models.llama_nemotron_rerank,
        "llama-nemotron-rerank-1b-v2",
        "llama_nemotron_rerank",
        256,
        control=LLAMA3_CONTROL,
    ),
}
INSTRUCTION = "Find the paragraph 判断\nthat answers"
OFFLINE = """
import json, sys
from rerank_kit.engine.plan import plan_engine
from rerank_kit.models.pair import Pair
from rerank_kit.offline.program import leave
from rerank_kit.offline.reranker import OfflineReranker
from rerank_kit.settings import get_config
if __name__ == "__main__":
    texts, out = json.load(sys.stdin)
    plan = plan_engine(get_config())
    pairs = [Pair(*text) for text in texts]
    with OfflineReranker(plan) as reranker, open(out, "w") as file:
        results = [vars(r) for r in reranker.score(pairs)]
        ids = [p.ids for p in reranker.encoder.encode(pairs)]
        json.dump([results, ids], file)
    leave(0)
"""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(name): the family's checkpoint, made once."""
    made = {}

    def make(name: str) -> Path:
        if name not in made:
            family = FAMILIES[name]
            made[name] = family.make(tmp_path_factory.mktemp(name) / family.folder)
            if family.config:
                tiny_models.set_config(made[name], **dict(family.config))
        return made[name]

    return make


def offline_scores(
    python: list[str], model: Path, family: Family, pairs: list[Pair], work: Path
) -> tuple[list[dict], list[list[int]]]:
    """(results, token ids) of the pairs by OfflineReranker in a process of its own."""
    script, out = work / "offline.py", work / "out.json"
    script.write_text(OFFLINE)
    settings = {"MODEL_PATH": model, "DTYPE": "float32", "MAX_MODEL_LEN": family.max_length, "PYTHONPATH": KIT}
    settings |= dict(family.settings)
    # The engine in the same process: it starts faster.
    env = kit_environment(**settings, VLLM_ENABLE_V1_MULTIPROCESSING=0)
    asked = json.dumps([[(p.query, p.document, p.instruction) for p in pairs], str(out)])
    done = subprocess.run([*python, str(script)], input=asked, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@contextmanager
def serving(python: Path, model: Path, family: Family, logs: Path):
    """A real service that starts while other work goes on; yields a function that waits for it and gives its URL."""
    settings = {"MODEL_PATH": model, "PORT": free_port(), "LOG_DIR": logs, "DTYPE": "float32", "STOP_TIMEOUT_S": 0}
    settings |= {"MAX_MODEL_LEN": family.max_length, "PYTHON": python, **dict(family.settings)}
    # The API computes in its own process, too.
    settings |= {"EXTRA_ARGS": "--distributed-executor-backend uni", "VLLM_ENABLE_V1_MULTIPROCESSING": 0}
    command = ["sh", str(KIT / "start_rerank.sh"), "start"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    start = subprocess.Popen(command, env=kit_environment(**settings), **pipes)

    def ready() -> str:
        said = start.communicate(timeout=300)[0]
        assert start.returncode == 0, said
        return f"http://127.0.0.1:{settings['PORT']}/v1"

    try:
        yield ready
    finally:
        start.wait(timeout=300)
        stopped = run_kit("stop", **settings)
        assert stopped.returncode == 0, stopped.stderr


def server_scores(url: str, pairs: list[Pair]) -> tuple[list[float], list[int]]:
    """(scores, prompt tokens) of the pairs by /v1/score, one pair a call; the same scores in one call."""
    scores, lengths = [], []
    for pair in pairs:
        body = {"model": "qwen3-reranker", "text_1": pair.query, "text_2": pair.document}
        if pair.instruction:
            body["instruction"] = pair.instruction
        status, answer = http("POST", f"{url}/score", body)
        assert status == 200, answer
        scores.append(answer["data"][0]["score"])
        lengths.append(answer["usage"]["prompt_tokens"])
    plain = [pair for pair in pairs if not pair.instruction]
    body = {"model": "qwen3-reranker", "text_1": [p.query for p in plain], "text_2": [p.document for p in plain]}
    status, answer = http("POST", f"{url}/score", body)
    assert status == 200, answer
    assert [row["score"] for row in answer["data"]] == pytest.approx(scores[: len(plain)], abs=1e-4)
    return scores, lengths


def rerank_scores(url: str, pairs: list[Pair]) -> list[float]:
    """Scores of the pairs by /v1/rerank, one pair a call."""
    scores = []
    for pair in pairs:
        body = {"model": "qwen3-reranker", "query": pair.query, "documents": [pair.document]}
        status, answer = http("POST", f"{url}/rerank", body)
        assert status == 200, answer
        scores.append(answer["results"][0]["relevance_score"])
    return scores


# CI has 25 minutes: these differ from their neighbours in one setting each.
SOAK = ("xlm_roberta_embedding", "bert_identity", "bert_regression", "ctxl_mistral")


@pytest.mark.server
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.soak] * (n in SOAK)) for n in FAMILIES])
def test_scores_are_those_of_the_model_card(name, folder_of, fork_server, forked_python, tmp_path, monkeypatch, capsys):
    family = FAMILIES[name]
    profile = all_profiles()[family.profile]
    if profile.needs and find_spec(profile.needs) is None:
        pytest.skip(f"vLLM imports {profile.needs} for this family")
    model = folder_of(name)
    profile = settle(read_checkpoint(model), profile, get_config()).profile
    given = for_reference(read_checkpoint(model), profile)
    pairs = [Pair(*text) for text in (*family.texts, ASCII_LONG)]
    wanted = list(pairs)
    if family.control:
        spelled, broken = family.control
        pairs.append(Pair(*spelled))
        wanted.append(Pair(*broken))
    instructed = replace(pairs[0], instruction=INSTRUCTION)
    python = fork_server.command
    with serving(forked_python, model, family, tmp_path / "log") if family.online else nullcontext() as ready:
        results, ids = offline_scores(python, model, family, [*pairs, instructed], tmp_path)
        asked = results.pop()
        every = [*wanted, instructed]
        expected = reference_scores(model, profile.reference, every, None, family.max_length, **given)
        wanted_asked = expected.pop()
        if profile.instruction:
            assert asked["score"] == pytest.approx(wanted_asked, abs=1e-4)
            assert abs(asked["score"] - results[0]["score"]) > 1e-3, "the instruction changes nothing"
        else:
            assert asked["score"] is None and "takes no instruction" in asked["error"]
        assert [r["score"] for r in results] == pytest.approx(expected, abs=1e-4)
        assert max(expected) - min(expected) > 0.1, "scores that do not differ prove nothing"
        assert [r["cut"] for r in results] == [len(p.query) + len(p.document) > 1000 for p in pairs]
        if profile.reference in PROMPT_IDS and not profile.own_prompt:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            prompt_ids = PROMPT_IDS[profile.reference]
            assert ids[: len(wanted)] == [prompt_ids(tokenizer, p, None, family.max_length) for p in wanted]

        if not family.online:
            return
        url = ready()
        online = [i for i, p in enumerate(pairs) if len(p.document) < 1000 or p.document.isascii()]
        scores, lengths = server_scores(url, [pairs[i] for i in online] + [instructed] * profile.instruction)
        wanted_scores = [expected[i] for i in online] + [wanted_asked] * profile.instruction
        assert scores == pytest.approx(wanted_scores, abs=1e-4)
        some = [i for i in online if pairs[i].query == "" or pairs[i].query == "empty document"]
        assert rerank_scores(url, [pairs[i] for i in some]) == pytest.approx([expected[i] for i in some], abs=1e-4)
        if profile.reference != "embedding":
            assert lengths[: len(online)] == [len(ids[i]) for i in online]
        if not profile.instruction:
            body = {"model": "qwen3-reranker", "query": "q", "documents": ["d"], "instruction": INSTRUCTION}
            status, answer = http("POST", f"{url}/rerank", body)
            assert status == 422 and "takes no instruction" in answer["error"]["message"]
        # What is served may be a folder of links: check looks at the checkpoint behind it. own_template: the one family
        # here that sentence-transformers can score too.
        if profile.config_changes or name == "own_template":
            monkeypatch.setenv("MODEL_PATH", str(model))
            monkeypatch.setenv("PORT", str(urlsplit(url).port))
            assert check.main(["--reference"]) == 0
            said = capsys.readouterr().out
            assert f"{model}, profile {profile.name}" in said and "float32 agrees within" in said
            if name == "own_template" and LIBRARY.is_dir():
                assert "in float32 and the kit's own recipe agree within" in said


@pytest.mark.parametrize("name", FAMILIES)
def test_the_profile_is_found_from_the_files(name, folder_of):
    family = FAMILIES[name]
    found = read_checkpoint(folder_of(name))
    if all_profiles()[family.profile].unsupported:
        with pytest.raises(ConfigError, match=all_profiles()[family.profile].title):
            find_profile(found)
    else:
        assert find_profile(found).name == family.profile


def logit_score(folder: Path, true: str, false: str | None) -> Path:
    """The files of sentence-transformers 5.4 that name the tokens of the score."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {"true_token_id": tokenizer.convert_tokens_to_ids(true)}
    ids["false_token_id"] = None if false is None else tokenizer.convert_tokens_to_ids(false)
    kind = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
    (folder / "modules.json").write_text(json.dumps([{"path": "1_LogitScore", "type": kind}]))
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps(ids))
    return folder


@pytest.mark.parametrize(
    ("make", "true", "false", "profile"),
    [
        (tiny_models.mxbai_rerank_v2, "1", "0", "mxbai_rerank_v2"),
        (tiny_models.bge_reranker_v2_gemma, "Yes", None, "bge_reranker_v2_gemma"),
    ],
)
def test_the_tokens_of_the_score_name_the_family_in_a_folder_of_any_name(make, true, false, profile, tmp_path):
    folder = make(tmp_path / "my-model")
    with pytest.raises(ConfigError, match="which token answers is nowhere written"):
        find_profile(read_checkpoint(folder))
    assert find_profile(read_checkpoint(logit_score(folder, true, false))).name == profile
    other = logit_score(make(tmp_path / "other"), "yes", false)
    with pytest.raises(ConfigError, match="no profile has these tokens, and no chat template"):
        find_profile(read_checkpoint(other))


GEMMA_OWN = (
    "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'system' -%}T: {{ m.content }}\n{% endif -%}{% endfor -%}"
    "A: {{ messages[-2].content }}\nB: {{ messages[-1].content }}\nIs B an answer?"
)


@pytest.mark.parametrize("own", [False, True])
def test_a_chat_template_that_writes_bos_itself_gets_it_once(own, tmp_path):
    """transformers adds no token to what a chat template renders; the server's tokenizer puts <bos> before a text."""
    folder = logit_score(tiny_models.bge_reranker_v2_gemma(tmp_path / "my-model"), "Yes", None)
    change_modules = json.loads((folder / "modules.json").read_text())
    change_modules.insert(0, {"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"})
    (folder / "modules.json").write_text(json.dumps(change_modules))
    (folder / "sentence_bert_config.json").write_text('{"modality_config": {"message": {"format": "flat"}}}')
    card = "{{ bos_token }}A: {{ messages[0].content }}\nB: {{ messages[1].content }}\n" + BGE_TASK
    (folder / "chat_template.jinja").write_text(GEMMA_OWN if own else card)
    plan = plan_engine(get_config(), folder, Machine("0.32.0+cpu", (), (0, 1), 2**34))
    assert plan.profile.name == "bge_reranker_v2_gemma" and plan.profile.instruction == own
    encoder = PairEncoder(plan)
    pairs = [Pair("a query", "a document"), Pair("two\nlines", "<eos> is broken")][: 2 - own]
    pairs += [Pair("q", "d", "find it")] * own
    ids = [prompt.ids for prompt in encoder.encode(pairs)]
    broken = [replace(pair, document=pair.document.replace("<eos>", "< eos>")) for pair in pairs]
    assert ids == [_chat_ids(encoder.tokenizer, folder, pair, None, 2048) for pair in broken]
    assert (
        plan.why["template"]
        == "the checkpoint's own: chat_template.jinja; profile bge_reranker_v2_gemma has another prompt"
    ) == own


def checkpoint(name, architectures, modules=(), pooling=None, **config):
    return Checkpoint(Path("/m") / name, {"architectures": architectures, **config}, modules, None, pooling)


ONE_LABEL = {"id2label": {"0": "LABEL_0"}}
OWN_CODE = {"auto_map": {"AutoModelForSequenceClassification": "org/code--modeling.Model"}}
ST = ("Transformer", "Pooling")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (checkpoint("nli", ["BertForSequenceClassification"], id2label={"0": "a", "1": "b", "2": "c"}), "nli_head"),
        (checkpoint("two", ["XLMRobertaForSequenceClassification"]), "nli_head"),
        (
            checkpoint("jina-reranker-v2", ["XLMRobertaForSequenceClassification"], **ONE_LABEL, **OWN_CODE),
            "own_code",
        ),
        (
            checkpoint("gte-multilingual-reranker", ["NewForSequenceClassification"], **ONE_LABEL, **OWN_CODE),
            "own_code",
        ),
        (checkpoint("jina-embeddings-v3", ["XLMRobertaModel"], ST, ("mean",), **OWN_CODE), "own_code"),
        (checkpoint("jina-reranker-v3", ["JinaForRanking"]), "listwise"),
        (checkpoint("jina-reranker-m0", ["JinaVLForRanking"]), "multimodal"),
        (checkpoint("mxbai-rerank-base-v1", ["DebertaV2ForSequenceClassification"], **ONE_LABEL), "deberta"),
        (checkpoint("bge-reranker-v2-minicpm-layerwise", ["LayerWiseMiniCPMForCausalLM"]), "layerwise"),
        (checkpoint("ettin-reranker", ["ModernBertModel"], (*ST, "Dense", "LayerNorm"), ("cls",)), "head_in_modules"),
        (checkpoint("colbertv2.0", ["HF_ColBERT"]), "late_interaction"),
        (checkpoint("jina-colbert-v2", ["HF_ColBERT"], **OWN_CODE), "late_interaction"),
        (checkpoint("GTE-ModernColBERT-v1", ["ModernBertModel"], ("Transformer", "Dense")), "late_interaction"),
        (checkpoint("max", ["BertModel"], ST, ("max",)), "pooling"),
        (checkpoint("two modes", ["BertModel"], ST, ("mean", "cls")), "pooling"),
    ],
)
def test_a_family_that_cannot_be_served_is_refused_with_its_reason(found, reason):
    with pytest.raises(ConfigError) as caught:
        find_profile(found)
    refused = all_profiles()[reason]
    assert refused.title in str(caught.value) and refused.unsupported in str(caught.value)
    assert reason not in load_profiles()
    with pytest.raises(ConfigError, match="cannot be served"):
        find_profile(found, reason)


@pytest.mark.parametrize(
    "found",
    [
        checkpoint("Qwen2.5-0.5B", ["Qwen2ForCausalLM"]),
        checkpoint("gemma-2b", ["GemmaForCausalLM"]),
        checkpoint("mxbai-rerank-base-v2-seq", ["Qwen2ForSequenceClassification"], **ONE_LABEL),
        checkpoint("Qwen3-VL-2B", ["Qwen3VLForConditionalGeneration"]),
    ],
)
def test_what_is_not_known_is_not_guessed(found):
    with pytest.raises(ConfigError, match=r"cannot be served.*\nuse instead: "):
        find_profile(found)


def test_the_own_choice_of_a_profile_still_counts():
    found = checkpoint("jina-reranker-v2", ["XLMRobertaForSequenceClassification"], **ONE_LABEL, **OWN_CODE)
    assert find_profile(found, "cross_encoder").name == "cross_encoder"


@pytest.mark.parametrize(
    ("data", "modes"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ("cls", "mean")),
        ({"pooling_mode_max_tokens": True}, ("pooling_mode_max_tokens",)),
        ({"pooling_mode": "lasttoken", "include_prompt": True}, ("lasttoken",)),
        ({"pooling_mode": ["mean", "max"]}, ("mean", "max")),
        ({}, ()),
    ],
)
def test_read_checkpoint_knows_the_pooling(tmp_path, data, modes):
    (tmp_path / "config.json").write_text("{}")
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(data))
    assert read_checkpoint(tmp_path).pooling == modes


def test_every_profile_says_what_its_score_means():
    for profile in load_profiles().values():
        assert profile.title and profile.match and profile.score and profile.reference
        assert profile.template is None or (PROFILE_DIR / profile.template).is_file()
        assert profile.instruction == (profile.template is not None and "instruction" in profile.template_text())


QWEN_TEMPLATES = ("qwen3_reranker", "mxbai_rerank_v2", "zerank2", "qwen3_vl_reranker", "ctxl_rerank_v2")


def test_templates_of_qwen_neutralise_the_same_tokens():
    macro = "{%- macro plain"
    texts = [(PROFILE_DIR / f"{n}.jinja").read_text() for n in QWEN_TEMPLATES]
    blocks = {text[text.index(macro) : text.index("{%- endmacro")] for text in texts}
    assert len(blocks) == 1


@pytest.mark.parametrize("name", ["mxbai_rerank_v2", "zerank2", "qwen3_vl_reranker"])
def test_the_prompt_keeps_its_last_newline(name, tmp_path):
    from transformers import AutoTokenizer

    tiny_models.qwen3_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = all_profiles()[name].template_text()
    messages = [{"role": "query", "content": "q"}, {"role": "document", "content": "d"}]
    for ending in ("", "\n"):  # an editor may add or strip the file's last newline
        rendered = tokenizer.apply_chat_template(messages, chat_template=text.rstrip("\n") + ending, tokenize=False)
        assert rendered.endswith("<|im_end|>\n<|im_start|>assistant\n")
