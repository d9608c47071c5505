"""Cold start: files in, files out, broken lines, resume; the real engine once."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import KIT, Later, kit_environment
from one_file import score_file

import vllm_usage
import vllm_usage_tiny
from rerank_kit.engine.plan import plan_service
from rerank_kit.models import library, reference
from rerank_kit.models.card_prompts import qwen3_prompt_ids
from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.images import BadImage
from rerank_kit.models.pair import Pair
from rerank_kit.models.profiles import load_profiles
from rerank_kit.offline import files
from rerank_kit.offline import program as offline_program
from rerank_kit.offline import prompts as offline_prompts
from rerank_kit.offline import reranker as offline_reranker
from rerank_kit.offline.feeding import Batch
from rerank_kit.offline.files import Result, lines_done, parse_line, read_chunks
from rerank_kit.offline.prompts import Prompt
from rerank_kit.settings import ConfigError, get_config

torch = Later("torch")


class LengthReranker:
    """Scores a pair by its document's length, so that a misplaced score is seen."""

    def __init__(self):
        self.calls = []

    chunk = 4

    def prepare(self, pairs):
        return pairs

    def stream(self, source):
        for tag, pairs in source:
            yield tag, self.run(pairs)

    def run(self, pairs):
        self.calls.append(len(pairs))
        return [
            Result(None, error="no score")
            if len(p.document) > 90
            else Result(len(p.document) / 100, len(p.document) > 25)
            for p in pairs
        ]


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), "utf-8")
    return path


def read_rows(path: Path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def row(n, **more):
    return {"query": "q", "document": "d" * n, **more}


def test_score_file_keeps_order_ids_and_reports_broken_lines(tmp_path, capsys):
    rows = [row(10, id="a"), "{broken", row(20), '{"query": 1, "document": "x", "id": 7}', row(95), "[]", "", row(30)]
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert score_file(LengthReranker(), source, output, 0, len(rows)) == (3, 4)
    out = read_rows(output)
    assert [r["line"] for r in out] == [1, 2, 3, 4, 5, 6, 8]  # a blank line is no record
    assert [r.get("score") for r in out] == [0.1, None, 0.2, None, None, None, 0.3]
    assert out[0]["id"] == "a" and out[3]["id"] == 7
    assert [r.get("cut") for r in out] == [None] * 6 + [True]
    assert "query" in out[3]["error"] and out[4]["error"] == "no score"
    said = capsys.readouterr().err
    assert "line 2: " in said and "line 5: no score" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"query": "a"}', "field 'document' is missing or not a text"),
        ('{"query": "a", "document": "b", "instruction": 3}', "'instruction' is not a text"),
        ('{"query": "\\ud800", "document": "b"}', "lone surrogate"),
        ("nope", "Expecting value"),
        ("[" * 100_000, ""),
    ],
)
def test_parse_line_says_what_is_wrong(text, said):
    result = parse_line(text, 4)
    assert result["line"] == 4 and said in result["error"]


def test_parse_line_keeps_null_instruction_and_id():
    assert parse_line('{"query":"q","document":"d","instruction":null,"id":null}', 1) == Pair(
        "q", "d", None, 1, (("id", None),)
    )


def test_a_lone_surrogate_in_an_id_comes_back_as_it_was(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [row(1, id="\ud83d"), row(2, id=["汉", {"\udfff": 0}])])
    output = tmp_path / "out.jsonl"
    assert score_file(LengthReranker(), source, output, 0, 2) == (2, 0)
    assert [r["id"] for r in read_rows(output)] == ["\ud83d", ["汉", {"\udfff": 0}]] and lines_done(output).lines == 2
    assert '"\\ud83d"' in output.read_text("utf-8") and "汉" in output.read_text("utf-8")


def test_broken_utf8_costs_one_line(tmp_path):
    source = tmp_path / "in.jsonl"
    good = json.dumps(row(1)).encode()
    source.write_bytes(b"\xef\xbb\xbf" + good + b"\n" + b'{"query": "\xff"}\n' + good)
    chunk = next(read_chunks(source, 0))
    assert isinstance(chunk[0], Pair) and "not UTF-8" in chunk[1]["error"] and isinstance(chunk[2], Pair)


def test_resume_equals_a_single_run(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [row(n % 80, id=n) for n in range(23)])
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    score_file(LengthReranker(), source, whole, 0, 23)

    class Interrupted(LengthReranker):
        def run(self, pairs):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().run(pairs)

    with pytest.raises(KeyboardInterrupt):
        score_file(Interrupted(), source, parts, 0, 23)
    assert lines_done(parts).lines == 8
    with parts.open("a") as file:
        file.write('{"line": 9, "sco')  # killed in the middle of a write
    assert lines_done(parts).lines == 8
    second = LengthReranker()
    score_file(second, source, parts, 8, 23)
    assert sum(second.calls) == 15
    assert parts.read_bytes() == whole.read_bytes()


def folder_of_shards(folder: Path) -> Path:
    """Three good shards (one gzipped, one empty), two that cannot be read, one file that is none."""
    folder.mkdir()
    rows = [[row(n % 80, id=f"{name}{n}") for n in range(size)] for name, size in (("a", 11), ("c", 9))]
    write_rows(folder / "a.jsonl", rows[0])
    (folder / "b.jsonl").write_text("")
    packed = "".join(json.dumps(r) + "\n" for r in rows[1]).encode()
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(packed))
    (folder / "d.jsonl.gz").write_bytes(b"no gzip")
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(packed * 50)[:-30])  # cut off while it was copied
    write_rows(folder / "z.txt", ["something else"])
    return folder


def shards_of(source: Path, output: Path, part=(1, 1)):
    """(shards, what could not be read)."""
    shards, broken = [], []
    for pair in files.shard_files(source, output, part):
        try:
            shards.append(files.find_shard(*pair))
        except ConfigError as exc:
            broken.append(str(exc))
    return shards, broken


def test_a_folder_gives_the_outputs_of_its_files(tmp_path):
    source, output = folder_of_shards(tmp_path / "in"), tmp_path / "out"
    shards, broken = shards_of(source, output)
    assert len(broken) == 2 and "d.jsonl.gz" in broken[0] and "e.jsonl.gz" in broken[1], broken
    assert files.score_shards(LengthReranker(), shards) == (20, 0, [])
    for name in ("a.jsonl", "c.jsonl"):
        alone = tmp_path / name
        plain = source / name if name == "a.jsonl" else source / "c.jsonl.gz"
        score_file(LengthReranker(), plain, alone, 0, 11 if name == "a.jsonl" else 9)
        assert (output / name).read_bytes() == alone.read_bytes() and alone.stat().st_size
    assert (output / "b.jsonl").read_bytes() == b"" and sorted(p.name for p in output.iterdir()) == [
        "a.jsonl",
        "b.jsonl",
        "c.jsonl",
    ]


def test_a_folder_goes_on_within_a_shard(tmp_path):
    source, output = folder_of_shards(tmp_path / "in"), tmp_path / "out"
    files.score_shards(LengthReranker(), shards_of(source, tmp_path / "whole")[0])

    class Interrupted(LengthReranker):
        def run(self, pairs):
            if len(self.calls) == 5:  # 4 + 4 + 3, nothing, 4: within the third file
                raise KeyboardInterrupt
            return super().run(pairs)

    with pytest.raises(KeyboardInterrupt):
        files.score_shards(Interrupted(), shards_of(source, output)[0])
    left = [(s.skip, s.total) for s in shards_of(source, output)[0]]
    assert left == [(11, 11), (0, 0), (4, 9)]
    second = LengthReranker()
    files.score_shards(second, [s for s in shards_of(source, output)[0] if s.skip < s.total])
    assert sum(second.calls) == 5
    for name in ("a.jsonl", "c.jsonl"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_shard_that_breaks_while_it_is_read_does_not_stop_the_rest(tmp_path):
    source, output = folder_of_shards(tmp_path / "in"), tmp_path / "out"
    output.mkdir()
    names = ("e.jsonl.gz", "gone.jsonl", "a.jsonl")
    shards = [files.Shard(source / n, output / n.removesuffix(".gz"), 0, 450) for n in names]
    scored, failed, broken = files.score_shards(LengthReranker(), shards)
    assert failed == 0 and len(broken) == 2 and "e.jsonl.gz" in broken[0] and "gone.jsonl" in broken[1]
    assert lines_done(output / "a.jsonl").lines == 11
    assert 0 < lines_done(output / "e.jsonl").lines == scored - 11  # what could be read is kept


@pytest.mark.parametrize("full_first", [True, False])
def test_a_full_disk_costs_one_shard_and_no_more_scoring(tmp_path, full_first):
    source, good = write_rows(tmp_path / "in.jsonl", [row(1)] * 400), write_rows(tmp_path / "good.jsonl", [row(1)] * 8)
    full = files.Shard(source, Path("/dev/full"), 0, 400)
    shards = [full, files.Shard(good, tmp_path / "out.jsonl", 0, 8)]
    reranker = LengthReranker()
    scored, failed, broken = files.score_shards(reranker, shards if full_first else shards[::-1])
    assert (scored, failed, len(broken)) == (8, 0, 1) and "No space left on device" in broken[0]
    assert lines_done(tmp_path / "out.jsonl").lines == 8
    assert sum(reranker.calls) < 100  # what was prepared before the write failed


def test_parts_of_a_folder_are_all_of_it_once(tmp_path):
    source = folder_of_shards(tmp_path / "in")
    whole = files.shard_files(source, tmp_path)
    parts = [files.shard_files(source, tmp_path, (i, 3)) for i in (1, 2, 3)]
    assert sorted(pair for part in parts for pair in part) == whole and len(whole) == 5
    for text in ("0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"):
        with pytest.raises(ConfigError, match="is not I/N"):
            offline_program.parse_part(text)
    assert offline_program.parse_part("2/8") == (2, 8)
    write_rows(source / "c.jsonl", [row(1)])
    with pytest.raises(ConfigError, match="both would become"):
        files.shard_files(source, tmp_path)


def test_two_processes_do_not_write_one_output(tmp_path):
    source, output = write_rows(tmp_path / "in.jsonl", [row(1)] * 3), tmp_path / "out.jsonl"
    holds = "import rerank_kit.offline.files as s, sys, pathlib; "
    holds += "f = s._open_output(s.Shard(None, pathlib.Path(sys.argv[1])));"
    command = [sys.executable, "-c", holds + "print(1, flush=True); input()", str(output)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=KIT, text=True)
    assert other.stdout.readline() == "1\n"
    for attempt in (lambda: score_file(LengthReranker(), source, output, 0, 3), lambda: lines_done(output)):
        with pytest.raises((ConfigError, OSError), match="another process is writing it"):
            attempt()
    other.communicate("\n", timeout=60)
    before = files.find_shard(source, output)
    assert score_file(LengthReranker(), source, output, 0, 3) == (3, 0)
    _, _, broken = files.score_shards(LengthReranker(), [before])  # planned before the other one wrote
    assert "written it meanwhile" in broken[0] and lines_done(output).lines == 3


def test_lines_done_refuses_another_file(tmp_path):
    other = write_rows(tmp_path / "notes.txt", ["something else"])
    with pytest.raises(ConfigError, match="line 1 is not a score line"):
        lines_done(other)
    assert other.read_text() == "something else\n"


@pytest.mark.parametrize(
    "content",
    ['{"my": "config"}', "x", '{"line": 2', '{"line": 1, "score": 0.5}\n{"lime": 3', '{"line": 1, "my": 1}\n'],
)
def test_a_file_without_a_newline_is_not_cut_to_nothing(tmp_path, content):
    other = tmp_path / "config.json"
    other.write_text(content)
    with pytest.raises(ConfigError, match="is not a score line"):
        lines_done(other)
    assert other.read_text() == content


@pytest.mark.parametrize("left", ["{", '{"line": 1', '{"line": 1, "sco'])
def test_the_beginning_of_a_line_is_cut_off(tmp_path, left):
    output = tmp_path / "out.jsonl"
    output.write_text(left)
    assert lines_done(output).lines == 0 and output.read_text() == ""


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is not a regular file"):
        files.find_shard(tmp_path / "pipe", tmp_path / "out.jsonl")


def test_a_changed_input_is_noticed(tmp_path):
    source, output = write_rows(tmp_path / "in.jsonl", [row(n, id=n) for n in range(6)]), tmp_path / "out.jsonl"
    score_file(LengthReranker(), source, output, 0, 6)
    assert files.find_shard(source, output).skip == 6
    write_rows(source, [row(9, id=9), *(row(n, id=n) for n in range(6))])
    with pytest.raises(ConfigError, match=r"line 6 .* has the id 5, .* is 4: the input has changed"):
        files.find_shard(source, output)


def test_lines_without_a_score_count_in_later_runs_too(tmp_path, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    write_rows(source / "a.jsonl", [{"query": "no document", "id": 1}, row(1, id=2)])
    assert score_file(LengthReranker(), source / "a.jsonl", output / "a.jsonl", 0, 2) == (1, 1)
    args = SimpleNamespace(input=source, output=output, shard=None)
    assert offline_program.run_file(args, None) == 1
    assert "has 2 lines, 1 without a score" in capsys.readouterr().out
    (source / "b.jsonl.gz").write_bytes(b"no gzip")
    assert offline_program.run_file(args, None) == 1
    assert "nothing to do" in (said := capsys.readouterr().out) and "1 files not done" in said


class Windows:
    """Stands for long_documents.Fitter: a window has 4 characters, a query 2."""

    def windows(self, query, document, instruction):
        return query[:2], [document[i : i + 4] for i in range(0, len(document), 4)], len(query) > 2


class SlowFeeder:
    """Stands for feeding.Feeder: scores a prompt by its one id, one a step, the last one first; holds 3."""

    def __init__(self, scores=float):
        self.scores, self.queue, self.held, self.most = scores, [], 0, 0

    @property
    def has_room(self):
        return len(self.queue) < 3

    @property
    def busy(self):
        return bool(self.queue)

    def submit(self, prompts):
        batch = Batch(prompts, [None] * len(prompts), len(prompts))
        self.queue += [(batch, i) for i in range(len(prompts))]
        self.most = max(self.most, len(self.queue))
        return batch

    def step(self):
        batch, i = self.queue.pop()
        batch.outputs[i] = torch.tensor([self.scores(batch.prompts[i].ids[0])])
        batch.n_left -= 1

    def abort(self):
        self.queue.clear()


def without_engine(long_documents="truncate", instruction=True, **limits):
    """An OfflineReranker whose engine scores a document by its last character and cuts those above 4 characters."""
    reranker = object.__new__(offline_reranker.OfflineReranker)
    profile = SimpleNamespace(instruction=instruction, name="cross_encoder")
    cfg = get_config(long_documents=long_documents, **limits)
    reranker.plan, reranker.embeds, reranker.late = SimpleNamespace(profile=profile, cfg=cfg), False, None
    reranker.fitter = Windows() if long_documents == "chunk" else None
    encode = lambda pairs: [Prompt([ord(p.document[-1]) - ord("a")], len(p.document) > 4) for p in pairs]  # noqa: E731
    first = lambda texts, n: [text[:n] for text in texts]  # noqa: E731
    reranker.encoder = SimpleNamespace(encode=encode, max_length=4, first_tokens=first)
    reranker.feeder, reranker.chunk = SlowFeeder(), 4
    return reranker


def test_chunk_keeps_the_best_window():
    pairs = [Pair("q", "b"), Pair("q", "xxxbxxxdxxxc"), Pair("long", "xxxexxxd"), Pair("q", "a")]
    results = without_engine("chunk").score(pairs)
    assert [(r.score, r.windows, r.cut) for r in results] == [(1, 1, False), (3, 3, False), (4, 2, True), (0, 1, False)]
    assert files._output_row(pairs[2], results[2]) == {"line": 0, "score": 4, "cut": True, "windows": 2}


def test_a_score_that_is_no_number_is_an_error():
    reranker = without_engine("chunk")
    reranker.feeder = SlowFeeder(lambda n: math.nan if n == 1 else 0.5)
    for document in ("xxxbxxxd", "xxxdxxxb"):
        (result,) = reranker.score([Pair("q", document)])
        assert result.score is None and "nan" in result.error


def test_chunks_are_bounded_in_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_CHARS", 1000)
    source = write_rows(tmp_path / "in.jsonl", [row(400)] * 7)
    assert [len(chunk) for chunk in read_chunks(source, 0)] == [3, 3, 1]


def test_stream_keeps_the_engine_fed_and_the_order():
    reranker = without_engine()
    lists = [[Pair("q", chr(ord("a") + (7 * n + i) % 26)) for i in range(2)] for n in range(40)]
    got = list(reranker.stream((n, reranker.prepare(pairs)) for n, pairs in enumerate(lists)))
    assert [tag for tag, _ in got] == list(range(40))
    assert [[r.score for r in results] for _, results in got] == [
        [ord(p.document) - ord("a") for p in pairs] for pairs in lists
    ]
    assert reranker.feeder.most == 4  # two lists at a time


def test_error_reports_what_would_be_cut():
    results = without_engine("error").score([Pair("q", "b"), Pair("q", "xxxxxxb")])
    assert [r.score for r in results] == [1, None] and "longer than MAX_MODEL_LEN=4" in results[1].error
    assert [r.score for r in without_engine("truncate").score([Pair("q", "xxxxxxb")])] == [1]


@pytest.mark.parametrize(
    ("long_documents", "scores"),
    # One character is a token. Cut to 3 by the setting, nothing is too long; chunk cuts queries only, as the guard.
    [("truncate", [2, 1, 1]), ("error", [2, 1, 1]), ("chunk", [2, 3, 1])],
)
def test_token_limits_cut_as_in_the_service(long_documents, scores):
    reranker = without_engine(long_documents, max_tokens_per_doc=3, max_tokens_per_query=1)
    results = reranker.score([Pair("q", "xxc"), Pair("q", "xxbaxxxd"), Pair("qq", "b")])
    assert [r.score for r in results] == scores
    assert [r.cut for r in results] == [False, long_documents != "chunk", True]


def test_score_refuses_an_instruction_where_there_is_none():
    reranker = without_engine(instruction=False)
    results = reranker.score([Pair("q", "d"), Pair("q", "d", "do this"), Pair("q", "de")])
    assert [r.score for r in results] == [3, None, 4]
    assert results[1].error == "profile cross_encoder takes no instruction"


@pytest.mark.parametrize("over", [-1, 0, 1, 2, 5000])
def test_encoder_cuts_as_the_model_card(checkpoints, over):
    """At every boundary around MAX_MODEL_LEN: the model card's ids, the suffix kept, and the cut reported."""
    encoder = offline_prompts.PairEncoder(plan_service(get_config(max_model_len=256), checkpoints["qwen3"]))
    for pair in (Pair("q", " word"), Pair("query " * 60, "x")):
        fixed = len(encoder.encode([Pair(pair.query, "")])[0].ids)
        unit = len(encoder.encode([Pair(pair.query, pair.document * 9)])[0].ids) - fixed
        document = pair.document * 9 * max(1, (256 - fixed + over) // unit - 1)
        while len(qwen3_prompt_ids(encoder.tokenizer, Pair(pair.query, document))) < 256 + over:
            document += "7"
        long = Pair(pair.query, document, "do" if over == 5000 else None)
        (prompt,) = encoder.encode([long])
        assert prompt.ids == qwen3_prompt_ids(encoder.tokenizer, long, max_length=256)
        assert prompt.cut == (len(qwen3_prompt_ids(encoder.tokenizer, long)) > 256)
        assert len(prompt.ids) <= 256


def test_encoder_cuts_pairs_of_encoders_at_the_longer_side(checkpoints):
    from transformers import AutoTokenizer

    encoder = offline_prompts.PairEncoder(plan_service(get_config(max_model_len=64), checkpoints["bert"]))
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["bert"])
    for query, document in (("q", "doc " * 500), ("query " * 500, "d"), ("query " * 500, "doc " * 500), ("q", "d")):
        (prompt,) = encoder.encode([Pair(query, document)])
        expected = tokenizer(query, document, truncation=True, max_length=64)
        assert prompt.ids == expected["input_ids"] and prompt.n_first == expected["token_type_ids"].index(1)
        assert prompt.cut == (len(query + document) > 10)


def run_program(name, *args, timeout_s=300, python=(sys.executable,), **settings):
    command = [*python, str(KIT / name), *map(str, args)]
    return subprocess.run(command, env=kit_environment(**settings), capture_output=True, text=True, timeout=timeout_s)


@pytest.mark.parametrize(
    ("args", "settings", "said"),
    [
        ([], {}, "MODEL_PATH is not set"),
        (["--input", "/no/file", "--output", "/tmp/x"], {"use": "qwen3"}, "/no/file: No such file"),
        (["--input", __file__], {"use": "qwen3"}, "--input needs --output"),
        (["--output", "/tmp/x"], {"use": "qwen3"}, "--output and --shard need --input"),
        (["--shard", "1/4"], {"use": "qwen3"}, "--output and --shard need --input"),
        (
            ["--input", str(KIT / "profiles"), "--output", "/tmp/x"],
            {"use": "qwen3"},
            "has no *.jsonl, *.csv, *.tsv or *.parquet",
        ),
        (["--input", __file__, "--output", "/tmp/x", "--shard", "1/2"], {"use": "qwen3"}, "--shard needs a folder"),
        (["--model", "/no/model"], {}, "MODEL_PATH='/no/model' does not exist"),
    ],
)
def test_bad_calls_are_refused_before_the_model_loads(checkpoints, args, settings, said):
    if settings.pop("use", None):
        settings["MODEL_PATH"] = checkpoints["qwen3"]
    done = run_program("vllm_usage.py", *args, timeout_s=30, **settings)
    assert done.returncode == 6 and said in done.stderr, done.stderr


@pytest.mark.parametrize("program", [vllm_usage, vllm_usage_tiny])
def test_library_settings_of_env_count_offline(program, tmp_path, monkeypatch, capsys):
    env_file = tmp_path / "kit.env"
    env_file.write_text("MODEL_PATH=some/model\nHF_ENDPOINT=http://from.env\nVLLM_CPU_KVCACHE_SPACE=3\nDTYPE=float32\n")
    monkeypatch.setattr(os, "environ", {**os.environ, "KIT_ENV_FILE": str(env_file), "VLLM_CPU_KVCACHE_SPACE": "5"})
    os.environ.pop("HF_ENDPOINT", None)

    def seen(*_, **__):
        raise ConfigError(str([os.environ.get(k) for k in ("HF_ENDPOINT", "VLLM_CPU_KVCACHE_SPACE", "DTYPE")]))

    monkeypatch.setattr(program, "plan_engine", seen)
    monkeypatch.setattr(sys, "argv", ["program", "--model", "m"])
    assert program.main() == 6
    assert capsys.readouterr().err == "ConfigError: ['http://from.env', '5', None]\n"


def test_the_example_says_which_document_has_no_score(capsys):
    plan = SimpleNamespace(checkpoint=SimpleNamespace(path="m"), profile=SimpleNamespace(name="p"))
    results = [Result(0.2), Result(None, error="longer than MAX_MODEL_LEN=16"), Result(0.9), Result(0.0)]
    assert offline_program.print_example(plan, results) == 1
    shown = [line.split(" | doc")[0] for line in capsys.readouterr().out.splitlines()[3:]]
    assert shown[:3] == ["- score=0.9000 | idx=2", "- score=0.2000 | idx=0", "- score=0.0000 | idx=3"]
    assert shown[3] == "- error=longer than MAX_MODEL_LEN=16 | idx=1"
    assert offline_program.print_example(plan, [Result(0.5)] * 4) == 0


@pytest.mark.server
def test_real_file_run_interrupted_and_resumed(checkpoints, fork_server, tmp_path):
    """Kill the real run with Ctrl-C, run it again: each line once, scores as the reference computes them.

    The first run is no fork: it is the suite's one real start of vllm.LLM.
    """
    documents = ["The capital of China is Beijing.", "中国的首都是北京。", "Gravity attracts bodies."]
    rows = [{"query": f"question {n}", "document": documents[n % 3], "id": n} for n in range(4096 + 2048)]
    rows[5] = {"query": "no document", "id": 5}
    rows[7]["document"] = "far too long " * 2000
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    settings = {"MODEL_PATH": checkpoints["qwen3"], "DTYPE": "float32", "MAX_MODEL_LEN": 512}
    command = [sys.executable, str(KIT / "vllm_usage.py"), "--input", str(source), "--output", str(output)]
    first = subprocess.Popen(
        command,
        env=kit_environment(**settings),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    done_before = lines_done(output).lines
    assert first.returncode == 130 and "the same command goes on" in said, said[-2000:]
    assert 0 < done_before < len(rows) and "line 6: field 'document'" in said
    second = run_program("vllm_usage.py", "--input", source, "--output", output, python=fork_server.command, **settings)
    assert second.returncode == 1, "line 6 has no score: " + second.stderr[-2000:]
    assert f"going on after line {done_before}" in second.stderr
    out = read_rows(output)
    assert [r["line"] for r in out] == list(range(1, len(rows) + 1)) and [r["id"] for r in out] == list(
        range(len(rows))
    )
    assert "document" in out[5]["error"] and sum("error" in r for r in out) == 1
    assert [r["line"] for r in out if r.get("cut")] == [8]
    some = [0, 1, 2, 7, 4095, 4096, 5000, len(rows) - 1]
    pairs = [Pair(rows[i]["query"], rows[i]["document"]) for i in some]
    expected = reference.reference_scores(checkpoints["qwen3"], "causal_yes_no", pairs, None, 512)
    assert [out[i]["score"] for i in some] == pytest.approx(expected, abs=1e-4)
    third = run_program("vllm_usage.py", "--input", source, "--output", output, timeout_s=60, **settings)
    assert third.returncode == 1 and "nothing to do" in third.stdout and "1 without a score" in third.stdout


@pytest.mark.server
def test_tiny_prints_the_example_ranked(checkpoints, fork_server):
    done = run_program("vllm_usage_tiny.py", python=fork_server.command, MODEL_PATH_TINY=checkpoints["qwen3"])
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("- score=")]
    scores = [float(line.split("=")[1].split()[0]) for line in lines]
    assert len(lines) == 4 and scores == sorted(scores, reverse=True)
    assert "profile: qwen3_reranker" in done.stdout


def checked_plan(profile: str, dtype: str, scores: list[float]):
    """(plan, reranker) for check(), without vLLM."""
    plan = SimpleNamespace(
        engine={"max_model_len": 64},
        machine=SimpleNamespace(vllm_version="0"),
        cfg=SimpleNamespace(instruction=None),
        checkpoint=Checkpoint(Path(), {}, (), None),
        profile=load_profiles()[profile],
    )
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=f"torch.{dtype}"))
    llm = SimpleNamespace(llm_engine=config)
    return plan, SimpleNamespace(llm=llm, score=lambda pairs: [Result(score) for score in scores])


def test_check_fails_when_scores_differ(monkeypatch, capsys):
    plan, reranker = checked_plan("qwen3_reranker", "float32", [0.5, 0.7])
    for expected, known, agrees in (
        ([0.5, 0.70005], True, True),
        ([0.5, 0.7002], True, False),
        ([0.5, float("nan")], True, False),
        ([0.5, 0.7], False, False),
    ):
        said = [(True, "what it says"), (known, "what it says")]
        monkeypatch.setattr(vllm_usage_tiny, "compare", lambda *_, said=said: said)
        monkeypatch.setattr(vllm_usage_tiny, "reference_scores", lambda *_, expected=expected, **__: expected)
        assert vllm_usage_tiny.check(plan, reranker, [None, None]) is agrees
        assert capsys.readouterr().out.endswith("what it says\nwhat it says\n")


@pytest.mark.parametrize(
    ("dtype", "score", "wanted", "agrees"),
    [
        ("bfloat16", 20.25, 20.0, True),
        ("bfloat16", 8.0, 4.0, False),
        ("float32", 20.00005, 20.0, True),
        ("float32", 20.001, 20.0, False),
    ],
)
def test_check_compares_logits_alike_with_recipe_and_library(dtype, score, wanted, agrees, monkeypatch, capsys):
    plan, reranker = checked_plan("ctxl_rerank_v2", dtype, [score])
    monkeypatch.setattr(library, "library_scores", lambda *_: [wanted])
    monkeypatch.setattr(vllm_usage_tiny, "reference_scores", lambda *_, **__: [wanted])
    assert vllm_usage_tiny.check(plan, reranker, [None]) is agrees
    said = capsys.readouterr().out
    assert (f"in float32 {'and' if agrees else 'DIFFERS from'} vLLM in {dtype}") in said


def test_a_pair_whose_image_is_not_scored_has_a_reason_and_the_others_have_scores():
    reranker = without_engine("truncate")
    reranker.plan.images, reranker.plan.why = False, {}
    reranker.plan.profile.images = {}
    shown = Pair("q", "", images=(None, "data:image/png;base64,AAAA"))
    results = reranker.score([Pair("q", "b"), shown, Pair("q", "d"), shown])
    assert [r.score is None for r in results] == [False, True, False, True]
    assert "profile cross_encoder takes none here" in results[1].error
    assert [r.score for r in results[::2]] == [
        r.score for r in without_engine("").score([Pair("q", "b"), Pair("q", "d")])
    ]


def test_an_image_that_the_engine_cannot_read_fails_its_pair_alone():
    reranker = without_engine("truncate")
    prepared = reranker.prepare([Pair("q", "b"), Pair("q", "c"), Pair("q", "d")])
    found = reranker._results(prepared, [torch.tensor([0.5]), BadImage("no image"), torch.tensor([0.25])])
    assert [(r.score, r.error) for r in found] == [(0.5, None), (None, "no image"), (0.25, None)]
