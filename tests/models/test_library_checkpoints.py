"""Checkpoints as training libraries save them: the kit's scores are those that the library gives after loading.

{transformers 4.57, 5} x {sentence-transformers 3.4, 5.3, 6.2} x the ways to train and save x the architectures, made by
measurements/library_checkpoints.py with these libraries. What the kit does not serve is refused with the reason.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KIT, free_port, http, kit_environment, run_kit
from library import all_checkpoints, record

from rerank_kit.models import library
from rerank_kit.models.given import for_reference
from rerank_kit.models.opened import opened
from rerank_kit.models.pair import Pair
from rerank_kit.models.published import difference
from rerank_kit.models.reference import reference_scores
from rerank_kit.settings import ConfigError, get_config

sys.path.insert(0, str(KIT / "measurements"))
from library_checkpoints import PAIRS

# One checkpoint for each thing that only the engine can show; the soak test takes all.
ENGINE = ("max_length", "Qwen3-Reranker-true_false", "Qwen3-Reranker-seq-cls-labels", "ms-marco")
# sentence-transformers 3.4 wants transformers below 5, and 6.2 wants 5.
ENVIRONMENTS = (
    *("transformers-4.57-st-3.4", "transformers-4.57-st-5.3"),
    *("transformers-5.19-st-5.3", "transformers-5.19-st-6.2"),
)
OFFLINE = """
import json, os, sys
from rerank_kit.engine.plan import plan_engine
from rerank_kit.models.pair import Pair
from rerank_kit.offline.program import leave
from rerank_kit.offline.reranker import OfflineReranker
from rerank_kit.settings import get_config
if __name__ == "__main__":
    pairs, folders, out = json.load(sys.stdin)
    for number, folder in enumerate(folders):
        if os.fork() == 0:
            with OfflineReranker(plan_engine(get_config(), folder)) as reranker, open(f"{out}/{number}", "w") as file:
                json.dump([result.score for result in reranker.score([Pair(*pair) for pair in pairs])], file)
            leave(0)
        os.wait()
    leave(0)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    return all_checkpoints(tmp_path_factory.mktemp("library"))


def recorded(folder: Path) -> list[float]:
    """The library's scores. Where it gives logits and the kit's family gives probabilities, their sigmoid."""
    made = record(folder)
    return [1 / (1 + math.exp(-s)) for s in made["scores"]] if made.get("logit") else made["scores"]


def shown(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def test_the_matrix_is_whole(folders):
    assert {folder.parent.name for folder in folders} == set(ENVIRONMENTS)
    assert len(folders) > 80
    for folder in folders:
        scores = record(folder)["scores"]
        assert max(scores) - min(scores) > 0.01, f"{shown(folder)}: scores that do not differ prove nothing"


def test_every_checkpoint_gets_its_profile_or_a_reason(folders):
    wrong = []
    for folder in folders:
        made = record(folder)
        try:
            name, said = opened(folder, get_config()).profile.name, ""
        except ConfigError as exc:
            name, said = None, str(exc)
        if name != made["profile"] or made.get("refused", "") not in said:
            wrong.append(f"{shown(folder)}: profile {name}, not {made['profile']}: {said}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("all_environments", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_reference_has_the_librarys_scores(folders, all_environments):
    newest = {folder.name: folder for folder in folders}
    wrong = []
    for folder in folders if all_environments else newest.values():
        if not record(folder)["profile"]:
            continue
        found = opened(folder, get_config())
        pairs, length = [Pair(*pair) for pair in PAIRS], found.checkpoint.max_length
        given = for_reference(found.checkpoint, found.profile)
        scores = reference_scores(folder, found.profile.reference, pairs, None, length, **given)
        if scores != pytest.approx(recorded(folder), abs=1e-4):
            wrong.append(f"{shown(folder)}: {scores}, the library has {recorded(folder)}")
    assert not wrong, "\n".join(wrong)


def engine_scores(python: list[str], folders: list[Path], work: Path, dtype: str = "float32") -> list[list[float]]:
    """Scores of PAIRS with each checkpoint by OfflineReranker, one engine after the other."""
    script = work / "offline.py"
    script.write_text(OFFLINE)
    env = kit_environment(DTYPE=dtype, PYTHONPATH=KIT, VLLM_ENABLE_V1_MULTIPROCESSING=0, LOG_DIR=work / "log")
    asked = json.dumps([PAIRS, [str(folder) for folder in folders], str(work)])
    done = subprocess.run([*python, str(script)], input=asked, env=env, capture_output=True, text=True, timeout=1800)
    scores = [work / str(number) for number in range(len(folders))]
    missing = [shown(folder) for folder, file in zip(folders, scores, strict=True) if not file.exists()]
    assert done.returncode == 0 and not missing, f"{missing}: {done.stderr[-3000:]}"
    return [json.loads(file.read_text()) for file in scores]


def compare(fork_server, folders: list[Path], work: Path) -> None:
    wrong = []
    for folder, scores in zip(folders, engine_scores(fork_server.command, folders, work), strict=True):
        if scores != pytest.approx(recorded(folder), abs=1e-4):
            wrong.append(f"{shown(folder)}: {scores}, the library has {recorded(folder)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.server
def test_the_engine_has_the_librarys_scores(folders, fork_server, tmp_path):
    newest = {folder.name: folder for folder in folders}
    compare(fork_server, [newest[name] for name in ENGINE], tmp_path)


@pytest.mark.server
@pytest.mark.soak
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_engine_has_the_librarys_scores_for_all(folders, environment, fork_server, tmp_path):
    compare(fork_server, [f for f in folders if f.parent.name == environment and record(f)["profile"]], tmp_path)


def server_scores(python: Path, folder: Path, logs: Path) -> list[float]:
    """Scores of PAIRS by a service of its own."""
    settings = {"MODEL_PATH": folder, "PORT": free_port(), "LOG_DIR": logs, "DTYPE": "float32", "STOP_TIMEOUT_S": 0}
    # The API computes in its own process: it starts faster.
    settings |= {"PYTHON": python, "EXTRA_ARGS": "--distributed-executor-backend uni"}
    settings |= {"VLLM_ENABLE_V1_MULTIPROCESSING": 0}
    started, scores = run_kit("start", **settings), []
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        for query, document in PAIRS:
            body = {"model": "qwen3-reranker", "text_1": query, "text_2": document}
            status, answer = http("POST", f"http://127.0.0.1:{settings['PORT']}/v1/score", body)
            assert status == 200, answer
            scores.append(answer["data"][0]["score"])
        return scores
    finally:
        assert run_kit("stop", **settings).returncode == 0


@pytest.mark.server
@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("third", range(3))
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_service_has_the_librarys_scores_for_all(folders, environment, third, forked_python, tmp_path):
    wrong = []
    for folder in [f for f in folders if f.parent.name == environment and record(f)["profile"]][third::3]:
        try:
            scores = server_scores(forked_python, folder, tmp_path / "log")
        except AssertionError as exc:
            wrong.append(f"{shown(folder)}: {exc}")
            continue
        if scores != pytest.approx(recorded(folder), abs=1e-4):
            wrong.append(f"{shown(folder)}: {scores}, the library has {recorded(folder)}")
    assert not wrong, "\n".join(wrong)


# --- the library itself as reference (requirements-reference.txt) ---

needs_library = pytest.mark.skipif(not library.FOLDER.is_dir(), reason=library.INSTALL)


@needs_library
@pytest.mark.soak  # test_families.py has own_template, by check on a service
@pytest.mark.parametrize("name", ["own_default_prompt", "ms-marco", "bert_embedding-plain"])
def test_the_library_is_asked_in_a_process_of_its_own(folders, name):
    folder = next(f for f in reversed(folders) if f.name == name)
    found = opened(folder, get_config())
    scores = library.library_scores(found.checkpoint, found.profile, [Pair(*pair) for pair in PAIRS], None)
    assert scores == pytest.approx(recorded(folder), abs=1e-4)
    assert library.version() == "6.2.0"
    assert "sentence_transformers" not in sys.modules


@needs_library
@pytest.mark.server
@pytest.mark.parametrize("wrong", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_tiny_check_has_a_line_for_vllm_and_one_for_the_recipe(folders, fork_server, tmp_path, wrong):
    folder = shutil.copytree(next(f for f in reversed(folders) if f.name == "own_default_prompt"), tmp_path / "mine")
    settings = {"MODEL_PATH_TINY": folder, "DTYPE": "float32", "LOG_DIR": tmp_path / "log"}
    if wrong:  # another prompt than the library's: the kit and its recipe agree, and neither with the library
        settings["MODEL_PROFILE"] = "qwen3_reranker"
    command = [*fork_server.command, str(KIT / "vllm_usage_tiny.py"), "--check"]
    done = subprocess.run(command, env=kit_environment(**settings), capture_output=True, text=True, timeout=300)
    said = done.stdout
    assert "largest difference" in said and ": agrees" in said, said + done.stderr[-2000:]
    for who in ("vLLM in float32", library.RECIPE):
        line = f"sentence-transformers 6.2.0 in float32 {'DIFFERS from' if wrong else 'and'} {who} "
        assert len([one for one in said.splitlines() if one.startswith(line)]) == 1, said
    assert done.returncode == wrong, said + done.stderr[-2000:]


def test_a_difference_between_recipe_and_library_is_said(monkeypatch):
    def theirs(*_):
        if isinstance(answers[-1], Exception):
            raise answers[-1]
        return answers[-1]

    answers = []
    monkeypatch.setattr(library, "library_scores", theirs)
    for answer, agrees, said in (
        ([0.5, 0.70005], True, "agree within 5.0e-05"),
        ([0.5, 0.71], False, "DIFFERS from the kit's own recipe by 0.0100 (it gives 0.5000, 0.7100): one"),
        ([0.5, float("nan")], False, "DIFFERS"),
        (library.NotComparable("it is not installed"), True, "not compared with sentence-transformers: it is not"),
    ):
        answers.append(answer)
        [(found, text)] = library.compare(None, None, [], None, {library.RECIPE: ([0.5, 0.7], 1e-4, difference)})
        assert found is agrees and said in text
    answers.append([0.5, 0.71])
    others = {
        "vLLM in bfloat16": ([0.5, 0.7], 0.02, difference),
        library.RECIPE: ([0.5, 0.7], 1e-4, difference),
        "nobody": ([0.5, None], 0.02, difference),
    }
    lines = list(library.compare(None, None, [], None, others))
    assert [same for same, _ in lines] == [True, False, False]
    assert "and vLLM in bfloat16 agree within 1.0e-02" in lines[0][1]


def test_the_library_says_why_it_cannot_compare(folders, monkeypatch, tmp_path):
    plain = next(f for f in folders if f.name == "Qwen3-Reranker-plain")
    found = opened(plain, get_config())
    with pytest.raises(library.NotComparable, match="no template for a pair"):
        library.library_scores(found.checkpoint, found.profile, [], None)
    folder = next(f for f in folders if f.name == "ms-marco")
    found = opened(folder, get_config())
    monkeypatch.setattr(library, "FOLDER", tmp_path / "none")
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(library.NotComparable, match=r"pip install .*requirements-reference.txt"):
        library.library_scores(found.checkpoint, found.profile, [], None)
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(library.NotComparable, match="cannot load or score the folder: ModuleNotFoundError"):
        library.library_scores(found.checkpoint, found.profile, [], None)


# --- choices that the files leave to the user ---


def test_model_profile_is_the_users_own_word(folders, tmp_path):
    by_name = {folder.name: folder for folder in folders}
    bare, own = by_name["no_template"], by_name["own_template"]
    said = opened(bare, get_config(model_profile="qwen3_reranker")).why
    assert said["template"] == "that of profile qwen3_reranker, by MODEL_PROFILE"
    found = opened(own, get_config(model_profile="qwen3_reranker"))
    assert found.why["template"].endswith("by MODEL_PROFILE; chat_template.jinja has another one")
    assert found.template == found.profile.template_text()
    named = shutil.copytree(bare, tmp_path / "Qwen3-Reranker-mine")
    assert "no file of the checkpoint says" in opened(named, get_config()).why["template"]


def test_a_template_is_the_profiles_only_with_an_instruction_too(folders, tmp_path):
    official = next(f for f in folders if f.name == "official")
    found = opened(official, get_config())
    assert found.template == found.profile.template_text() and found.profile.instruction
    assert found.why["template"].endswith("which makes the prompts of the checkpoint's chat_template.jinja")
    folder = shutil.copytree(official, tmp_path / "mine")
    text = (folder / "chat_template.jinja").read_text().replace('"system"', '"nobody"').replace("'system'", "'nobody'")
    (folder / "chat_template.jinja").write_text(text)
    found = opened(folder, get_config())
    assert text in found.template and not found.profile.instruction


def test_an_inherited_chat_template_that_prints_any_role_is_no_prompt_for_pairs(folders, tmp_path):
    """Without sentence-transformers' files nobody scored through it: it came with the base model."""
    folder = shutil.copytree(next(f for f in folders if f.name == "Qwen3-Reranker-plain"), tmp_path / "Qwen3-Reranker")
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(text)
    found = opened(folder, get_config())
    assert found.template == found.profile.template_text()
    named = "{% for m in messages if m.role in ('query', 'document') %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(named)
    assert named in opened(folder, get_config()).template


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("README.md", "---\nlicense: mit\nbase_model:\n- Qwen/Qwen3-Reranker-0.6B\n---\n# A fine-tune\n"),
        ("README.md", "---\nbase_model: Qwen/Qwen3-Reranker-4B\n---\n"),
        ("args.json", '{"model": "/models/Qwen3-Reranker-8B/", "task_type": "generative_reranker"}'),
    ],
)
def test_a_fine_tune_is_known_by_its_base_in_a_folder_of_any_name(folders, tmp_path, file, text):
    for name, profile in (("plain", "qwen3_reranker"), ("seq-cls-plain", "qwen3_reranker_seq_cls")):
        source = next(f for f in folders if f.name == f"Qwen3-Reranker-{name}")
        folder = shutil.copytree(source, tmp_path / profile / "checkpoint-500")
        with pytest.raises(ConfigError, match=r"no file says how it writes|which token answers is nowhere written"):
            opened(folder, get_config())
        (folder / file).write_text(text)
        found = opened(folder, get_config())
        assert found.profile.name == profile and f"({file}: " in found.why["template"]


def test_instruction_takes_precedence_over_the_saved_prompt(folders):
    own = next(folder for folder in folders if folder.name == "own_default_prompt")
    found = opened(own, get_config(instruction="mine"))
    assert "mine" in found.template and "Find the paragraph" not in found.template
    assert found.why["instruction"] == "INSTRUCTION; config_sentence_transformers.json: prompts.task has another"


def change(folder: Path, name: str, **values) -> None:
    data = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps({**data, **values}))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[1].content }}|{{ messages[0].content }}", "does not put the query once before the document"),
        ("{{ messages[0].content }}{{ messages[0].content }}{{ messages[1].content }}", "does not put the query once"),
        ("{{ messages[0].content }}", "no file says how a pair is written"),
        ("{% if", "no file says how a pair is written"),
    ],
)
def test_a_template_that_cannot_be_served_is_refused_with_the_prompts(folders, tmp_path, template, said):
    folder = shutil.copytree(next(f for f in folders if f.name == "own_template"), tmp_path / "mine")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=said) as caught:
        opened(folder, get_config())
    assert "MODEL_PROFILE=qwen3_reranker" in str(caught.value)


def test_an_instruction_for_a_template_without_place_is_refused(folders, tmp_path):
    folder = shutil.copytree(next(f for f in folders if f.name == "own_template"), tmp_path / "mine")
    (folder / "chat_template.jinja").write_text("Q: {{ messages[-2].content }} D: {{ messages[-1].content }}\nA:")
    found = opened(folder, get_config())
    assert not found.profile.instruction
    with pytest.raises(
        ConfigError, match=r"INSTRUCTION is set, but chat_template\.jinja uses no message of role system"
    ):
        opened(folder, get_config(instruction="x"))
    change(folder, "config_sentence_transformers.json", prompts={"a": "Find"}, default_prompt_name="a")
    with pytest.raises(ConfigError, match="the default prompt 'Find'"):
        opened(folder, get_config())


def test_what_vllm_is_told_is_what_the_files_say(folders):
    def told(name: str) -> dict:
        return opened(next(f for f in reversed(folders) if f.name == name), get_config()).profile.hf_overrides

    assert told("Qwen3-Reranker-seq-cls-labels")["problem_type"] is None
    assert "problem_type" not in told("Qwen3-Reranker-seq-cls-plain")
    assert told("ms-marco")["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}
    assert "sentence_transformers" not in told("bert-plain")
    for name, tokens, method in (
        ("Qwen3-Reranker-true_false", ["false", "true"], "from_2_way_softmax"),
        ("Qwen3-Reranker-yes_only", ["yes"], "no_post_processing"),
        ("Yes_only", ["Yes"], "no_post_processing"),
    ):
        found = told(name)
        assert (found["classifier_from_token"], found["method"]) == (tokens, method)
        assert found["architectures"] == ["Qwen3ForSequenceClassification"]
    assert told("official")["classifier_from_token"] == ["no", "yes"]
    # The family's sigmoid stays, where the library gives the logit; `cfg` says so.
    identity = opened(next(f for f in folders if f.name == "seq_cls-identity"), get_config())
    assert "sentence-transformers gives Identity of the logit" in identity.why["activation"]
    assert told("xlmr_embedding-plain")["position_embedding_type"] == "absolute"


def test_a_similarity_other_than_cosine_is_said(folders, tmp_path):
    for name, said in (("bert_embedding-plain", False), ("xlmr_embedding-plain", True)):  # the second has no Normalize
        folder = shutil.copytree(next(f for f in reversed(folders) if f.name == name), tmp_path / name)
        assert "similarity" not in opened(folder, get_config()).why
        change(folder, "config_sentence_transformers.json", similarity_fn_name="dot")
        assert ("similarity" in opened(folder, get_config()).why) is said


def test_max_model_len_above_a_tokenizers_limit_is_the_users_choice_with_a_decoder(folders):
    from rerank_kit.engine.machine import Machine
    from rerank_kit.engine.plan import plan_service

    machine = Machine("0.32.0+cpu", (), (0, 1), 16 * 2**30)
    by_name = {folder.name: folder for folder in folders}
    plan = plan_service(get_config(), by_name["max_length"], machine)
    assert plan.engine["max_model_len"] == 160 and "tokenizer_config.json" in plan.why["max_model_len"]
    plan = plan_service(get_config(max_model_len=512), by_name["max_length"], machine)
    assert "the model's own library cuts at 160" in plan.why["max_model_len"]
    for name, settings in (("max_length", {"max_model_len": 4000}), ("bert-max_length", {"max_model_len": 64})):
        with pytest.raises(ConfigError, match=r"MAX_MODEL_LEN=\d+ is more than the \d+ tokens"):
            plan_service(get_config(**settings), by_name[name], machine)


def test_an_activation_of_others_is_ignored_as_the_library_does(folders, tmp_path):
    folder = shutil.copytree(next(f for f in folders if f.name == "bert-plain"), tmp_path / "mine")
    change(folder, "config.json", sentence_transformers={"activation_fn": "my.code.Act"})
    found = opened(folder, get_config())
    assert found.profile.hf_overrides["sentence_transformers"]["activation_fn"].endswith("Sigmoid")
    change(folder, "config_sentence_transformers.json", activation_fn="torch.nn.modules.activation.Tanh")
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "a.Transformer"}]')
    found = opened(folder, get_config())
    assert found.profile.hf_overrides["sentence_transformers"]["activation_fn"].endswith("Tanh")
    assert found.why["activation"] == "Tanh (config_sentence_transformers.json: activation_fn)"
