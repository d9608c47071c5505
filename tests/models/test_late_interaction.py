"""Late interaction (ColBERT models of PyLate): their tokens and MaxSim on the service and offline, and what is refused.

Within 1e-4 in float32 of rerank_kit/models/late_reference.py, which is compared with PyLate's own scores here.
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import tiny_registry
from conftest import Later, http
from test_families import Family, offline_scores, rerank_scores, server_scores, serving

from rerank_kit.client import rerank
from rerank_kit.client.errors import RerankHTTPError
from rerank_kit.engine.machine import Machine
from rerank_kit.engine.plan import plan_engine, plan_service
from rerank_kit.models.checkpoint import load_tokenizer, read_checkpoint
from rerank_kit.models.colbert import late_of
from rerank_kit.models.fitting import late_fitter
from rerank_kit.models.opened import opened
from rerank_kit.models.pair import Pair
from rerank_kit.models.profiles import find_profile
from rerank_kit.models.reference import reference_scores
from rerank_kit.serving import check
from rerank_kit.settings import ConfigError, get_config

transformers = Later("transformers")
PLAIN, ATTEND = {"do_query_expansion": False}, {"attend_to_expansion_tokens": True}
SETTINGS = {"plain": PLAIN, "attend": ATTEND, "classic": {}}
TEXTS = [
    ("What is the capital of China?", "The capital of China is Beijing."),
    ("What is the capital of China?", "Gravity attracts bodies, (yes) no!"),
    ("empty", ""),
    ("", "query"),
    ("long document", "Gravity attracts bodies. " * 60),
    ("Gravity attracts bodies. " * 20, "short - document"),
    ("中国的首都是哪里？", "中国的首都是北京。"),
    ("  edges  ", "  spaces [D] at both edges  "),
    ("[Q] lines", "line one\nline two\r\n..."),
]
# pylate 1.6.0 with sentence-transformers 5.3.0 on these checkpoints: ColBERT(folder).encode() of each text of TEXTS
# with is_query=True and False, and the sum of the largest dot products.
PYLATE = {
    ("ModernBert", "plain"): [5.66242, 4.98645, 2.47335, 2.09787, 1.91354, 7.25576, 3.96691, 3.85918, 2.79462],
    ("ModernBert", "attend"): [9.15089, 9.78201, 5.58953, 4.71015, 9.52875, 7.25576, 7.2114, 9.37244, 9.19109],
    ("ModernBert", "classic"): [9.21856, 8.36936, 0.9628, 6.30404, 7.36484, 7.25576, 5.4868, 7.93248, 9.772],
}
# Its tokenize() of the pair of edges; 1 is [CLS], 475 "[Q] ", 476 "[D] ", 2 [SEP] and 4 [MASK].
EDGES = TEXTS[7]
IDS = (
    [1, 475, 288, 75, 266, 2, *[4] * 18],
    [1, 476, 87, 84, 69, 71, 266, 225, 476, 274, 280, 83, 261, 225, 288, 75, 266, 2],
)
CPU = Machine("0.32.0+cpu", (), (0, 1), 64 * 2**30)
LENGTH = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind, name): a checkpoint, made once."""
    folders = {}

    def make(kind: str, name: str) -> Path:
        if (kind, name) not in folders:
            folder = tmp_path_factory.mktemp("late") / f"{kind}-{name}"
            folders[kind, name] = tiny_registry.colbert(folder, kind, **SETTINGS[name])
        return folders[kind, name]

    return make


@pytest.mark.parametrize(("kind", "name"), PYLATE)
def test_the_reference_is_pylate(kind, name, made):
    folder = made(kind, name)
    found = reference_scores(folder, "late_interaction", [Pair(*text) for text in TEXTS], None, 60)
    assert found == pytest.approx(PYLATE[kind, name], abs=1e-4)


def ids_of(folder: Path, late, pair: tuple[str, str]) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    sides = zip(pair, (True, False), strict=True)
    return [late.prompt(tokenizer.encode(late.text(*side)).ids, side[1])[0] for side in sides]


def test_the_tokens_are_pylates(made):
    folder = made("ModernBert", "attend")
    assert tuple(ids_of(folder, late_of(read_checkpoint(folder)), EDGES)) == IDS
    folder = made("ModernBert", "plain")
    assert tuple(ids_of(folder, late_of(read_checkpoint(folder)), EDGES)) == (IDS[0][:6], IDS[1])
    late = late_of(read_checkpoint(folder))
    assert [len(ids) for ids in ids_of(folder, late, ("a b c d " * 60, "a b c d " * 60))] == [24, 60]


@pytest.mark.server
@pytest.mark.parametrize(("kind", "name", "online"), [("ModernBert", "plain", True), ("Bert", "attend", False)])
def test_scores_are_those_of_pylate(kind, name, online, made, fork_server, forked_python, tmp_path, monkeypatch):
    folder = made(kind, name)
    late = opened(folder, get_config()).profile.late
    pairs = [Pair(*text) for text in TEXTS]
    family = Family(None, folder.name, "colbert", LENGTH)
    with serving(forked_python, folder, family, tmp_path / "log") if online else nullcontext() as ready:
        expected = reference_scores(folder, "late_interaction", pairs, None, LENGTH)
        results, _ = offline_scores(fork_server.command, folder, family, pairs, tmp_path)
        assert [r["score"] for r in results] == pytest.approx(expected, abs=1e-4)
        assert [r["cut"] for r in results] == [i in (4, 5) for i in range(len(pairs))]
        assert max(expected) - min(expected) > 1, "scores that do not differ prove nothing"
        if not online:
            return
        url = ready()
        scores, lengths = server_scores(url, pairs)
        assert scores == pytest.approx(expected, abs=1e-4)
        assert lengths == [sum(map(len, ids_of(folder, late, text))) for text in TEXTS]
        assert rerank_scores(url, pairs[:4]) == pytest.approx(expected[:4], abs=1e-4)
        query, documents = TEXTS[0][0], [document for _, document in TEXTS]
        of_one = reference_scores(folder, "late_interaction", [Pair(query, d) for d in documents], None, LENGTH)
        _, ranked, raw = rerank(query, documents, base_url=url)
        assert ranked == pytest.approx(of_one, abs=1e-4) and raw["_cut"] == [4]
        assert raw["meta"]["score_scale"]["name"] == "maxsim"
        # NIM's route asks for logits, for which vLLM would leave the vectors as long as they are.
        nim = {"query": {"text": query}, "passages": [{"text": d} for d in documents[:3]]}
        _, answer = http("POST", f"{url}/ranking", nim)
        assert {row["index"]: row["logit"] for row in answer["rankings"]} == pytest.approx(
            dict(enumerate(of_one[:3])), abs=1e-4
        )
        with pytest.raises(RerankHTTPError, match=r"documents\[4\] has more than the 60 tokens"):
            rerank(query, documents, base_url=url, long_documents="error")
        # In windows: the best window's score, each window a document of the model's length.
        found = late_fitter(transformers.AutoTokenizer.from_pretrained(folder), late).windows(query, documents[4])
        best = max(reference_scores(folder, "late_interaction", [Pair(query, w) for w in found[1]], None, LENGTH))
        assert len(found[1]) > 2
        _, windows, _ = rerank(query, [documents[4], documents[0]], base_url=url, long_documents="chunk")
        assert windows == pytest.approx([best, of_one[0]], abs=1e-4)
        _, short, raw = rerank(query, documents[:2], base_url=url, max_tokens_per_doc=3)
        first = late_fitter(transformers.AutoTokenizer.from_pretrained(folder), late)
        heads = [Pair(query, first.head(d, 3)) for d in documents[:2]]
        assert short == pytest.approx(reference_scores(folder, "late_interaction", heads, None, LENGTH), abs=1e-4)
        assert raw["_cut"] == [0, 1]
        monkeypatch.setenv("MODEL_PATH", str(folder))
        monkeypatch.setenv("PORT", str(urlsplit(url).port))
        assert check.main(["--reference"]) == 0


def test_the_plan_of_a_late_interaction_model(made, tmp_path):
    folder, cfg = made("Bert", "attend"), get_config(log_dir=str(tmp_path))
    plan = plan_service(cfg, folder, CPU)
    assert plan.profile.name == "colbert" and plan.engine["pooler_config"] == {"task": "token_embed"}
    assert plan.engine["max_model_len"] == 60, "not the 23 of sentence_bert_config.json"
    assert plan.env["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"
    assert json.loads(plan.env["GUARD_LATE"])["expansion"] == plan.profile.late.expansion
    assert '"maxsim"' in plan.env["GUARD_SCORE_SCALE"]
    assert plan_engine(cfg, folder, CPU).engine["max_model_len"] == 60
    longer = plan_service(get_config(log_dir=str(tmp_path), max_model_len=200), folder, CPU)
    assert (longer.profile.late.query_length, longer.profile.late.document_length) == (24, 200)
    assert longer.engine["max_model_len"] == 200
    for settings, words in (
        ({"guard": 0}, "GUARD=0, and profile colbert is late interaction"),
        ({"max_model_len": 257}, "MAX_MODEL_LEN=257 is more than the 256 tokens"),
        ({"max_model_len": 20}, "MAX_MODEL_LEN=20 is less than the 24 tokens to which every query is filled"),
        ({"instruction": "Find"}, "INSTRUCTION is set, but profile colbert takes none"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan_service(get_config(log_dir=str(tmp_path), **settings), folder, CPU)


def edited(source: Path, folder: Path, file: str, values: dict) -> Path:
    shutil.copytree(source, folder)
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({k: v for k, v in (data | values).items() if v is not ...}))
    return folder


OWN = "config_sentence_transformers.json"


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        (OWN, {"attend_to_expansion_tokens": False}, "has attend_to_expansion_tokens=false, so the"),
        (OWN, {"attend_to_expansion_tokens": None}, "has attend_to_expansion_tokens=false, so the"),
        (OWN, {"query_prefix": "[X] "}, r"has query_prefix=\"\[X\] \", and .* has no such token"),
        (OWN, {"document_length": "180"}, 'has document_length="180", and a.* is expected'),
        (OWN, {"skiplist_words": "!"}, "has skiplist_words="),
        (OWN, {"skiplist_words": [1]}, "has skiplist_words=1"),
        (OWN, {"prompts": {"query": "search: "}, "default_prompt_name": "query"}, "is the default prompt 'search: '"),
        (OWN, {"model_type": "SentenceTransformer"}, "late interaction models .* from PyLate's files alone"),
        ("1_Dense/config.json", {"use_residual": True}, "has use_residual=true, which vLLM does not compute"),
        (
            "1_Dense/config.json",
            {"activation_function": "torch.nn.modules.activation.Tanh"},
            "has activation_function=.*, which vLLM does not compute",
        ),
        ("tokenizer_config.json", {"mask_token": None}, "names no mask_token, which has to fill a query"),
        ("tokenizer_config.json", {"unk_token": None}, "names no unk_token, which has to stand for"),
    ],
)
def test_what_vllm_would_score_otherwise_is_refused(file, values, words, made, tmp_path):
    folder = edited(made("Bert", "attend"), tmp_path / "mine", file, values)
    with pytest.raises(ConfigError, match=words):
        opened(folder, get_config())


def test_a_dense_layer_that_is_missing_is_refused(made, tmp_path):
    """vLLM leaves it out without a word."""
    folder = shutil.copytree(made("Bert", "attend"), tmp_path / "mine")
    (folder / "1_Dense" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"1_Dense/model\.safetensors is missing"):
        opened(folder, get_config())


def test_what_the_files_may_leave_out(made, tmp_path):
    """No markers, no skipped tokens, a prompt before each text, as ColBERT-Zero has it."""
    values = {"query_prefix": "", "document_prefix": "", "skiplist_words": [], **PLAIN}
    values |= {"prompts": {"query": "the ", "document": "body: "}, "query_length": None, "document_length": None}
    folder = edited(made("ModernBert", "plain"), tmp_path / "mine", OWN, values)
    found = opened(folder, get_config(log_dir=str(tmp_path)))
    late = found.profile.late
    assert (late.query_length, late.document_length, late.skip) == (32, 180, ())
    assert "'the ', 'body: '" in found.why["prompts"]
    tokenizer = load_tokenizer(folder)
    assert ids_of(folder, late, ("capital", "China")) == [
        tokenizer.encode("the capital").ids,
        tokenizer.encode("body: China").ids,
    ]


def test_other_late_interaction_models_are_refused(made, tmp_path):
    stanford = shutil.copytree(made("Bert", "attend"), tmp_path / "colbertv2.0")
    config = json.loads((stanford / "config.json").read_text()) | {"architectures": ["HF_ColBERT"]}
    (stanford / "config.json").write_text(json.dumps(config))
    (stanford / "modules.json").unlink()
    with pytest.raises(ConfigError, match="of a family that cannot be served, other late interaction models"):
        find_profile(read_checkpoint(stanford))
