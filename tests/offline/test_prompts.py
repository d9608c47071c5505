"""Token ids of many pairs at a time are those of the slow way: one by one by Jinja and transformers."""

import random
from types import SimpleNamespace

import pytest
import tiny_models

from rerank_kit.engine.choices import PIECES
from rerank_kit.guard.long_bodies import fit_payload, payload_fits_surely
from rerank_kit.models.fitting import Fitter
from rerank_kit.models.pair import Pair
from rerank_kit.models.profiles import all_profiles
from rerank_kit.offline.prompts import MARKS, PairEncoder

TEMPLATES = {name: profile.template_text() for name, profile in all_profiles().items() if profile.template}
MAX_LENGTH = 300


def encoder_of(folder, template, max_length=MAX_LENGTH):
    engine = {"model": str(folder), "max_model_len": max_length}
    plan = SimpleNamespace(
        checkpoint=SimpleNamespace(path=folder), profile=SimpleNamespace(late=None), template=template, engine=engine
    )
    return PairEncoder(plan)


def nasty_pairs(tokenizer, n_pairs, seed):
    """Pairs of control tokens, halves of them, marks, scripts, white space; some too long, some with instructions."""
    rng = random.Random(seed)
    pieces = [*PIECES, *MARKS.values(), "{{ messages }}", "{% raw %}", "\\ue000", "<bos>", "<unused7>", "[SEP]", "</s>"]
    pieces += [token.content for token in tokenizer.added_tokens_decoder.values()]
    pieces += [piece[: len(piece) // 2] for piece in pieces]

    def text(most):
        return "".join(rng.choices(pieces, k=rng.randint(0, most)))

    out = [Pair("", ""), Pair("q", ""), Pair("", "d"), Pair("\n", "\n\n"), Pair(*"qd", ""), Pair(*"qd", "do\n")]
    while len(out) < n_pairs:
        instruction = rng.choice([None, None, "", text(4)])
        out.append(Pair(text(5), text(rng.choice([3, 12, 60])), instruction))
    return out


def slow_ids(encoder, pair):
    """(ids, cut) of one pair as the kit made them pair by pair."""
    tokenizer = encoder.tokenizer
    if encoder.template is None:
        whole = tokenizer([pair.query], [pair.document])["input_ids"][0]
        cut = tokenizer([pair.query], [pair.document], truncation="longest_first", max_length=encoder.max_length)
        kinds = cut["token_type_ids"][0] if "token_type_ids" in cut else []
        return cut["input_ids"][0], len(whole) > encoder.max_length, kinds.index(1) if 1 in kinds else None

    def rendered(pair):
        chat = [{"role": "query", "content": pair.query}, {"role": "document", "content": pair.document}]
        more = {"instruction": pair.instruction} if pair.instruction else {}
        return tokenizer.apply_chat_template(chat, chat_template=encoder.template, tokenize=False, **more)

    ids = tokenizer(rendered(pair))["input_ids"]
    if len(ids) <= encoder.max_length:
        return ids, False, None
    suffix = rendered(Pair("", "\ue009", pair.instruction)).rpartition("\ue009")[2]
    suffix = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    return ids[: encoder.max_length - len(suffix)] + suffix, True, None


def same_as_slow(encoder, pairs):
    """How many pairs were compared, and how many of them were cut."""
    n_cut = 0
    for pair, prompt in zip(pairs, encoder.encode(pairs), strict=True):
        n_cut += prompt.cut
        if prompt.cut and encoder._document_first:
            continue  # tests/models/test_document_first.py: not the end of the prompt is cut there
        assert (prompt.ids, prompt.cut, prompt.n_first) == slow_ids(encoder, pair), pair
    return len(pairs), n_cut


@pytest.mark.parametrize("fastokens", ["0", "1"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_give_the_ids_of_jinja_and_transformers(name, fastokens, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_FASTOKENS", fastokens)
    (tiny_models.gemma_tokenizer if "gemma" in name else tiny_models.qwen3_tokenizer)(tmp_path)
    encoder = encoder_of(tmp_path, TEMPLATES[name])
    n_pairs, n_cut = same_as_slow(encoder, nasty_pairs(encoder.tokenizer, 600, seed=3))
    assert n_pairs == 600 and 30 < n_cut < 500
    # The fast way was taken, and not the way back to Jinja that an odd template has: an empty text is NULL there.
    fast = [bool(encoder._frames[with_instruction]) for with_instruction in (False, True)]
    assert fast == [name != "qwen3_vl_reranker"] * 2
    if fastokens == "1" and "gemma" not in name:
        pytest.importorskip("fastokens")
        assert encoder._ids_of is not None
    else:
        assert encoder._ids_of is None and encoder._backend is not None


@pytest.mark.parametrize("maker", ["bert_cross_encoder", "xlm_roberta_cross_encoder", "modernbert_cross_encoder"])
def test_segments_give_the_ids_of_transformers(maker, tmp_path):
    encoder = encoder_of(getattr(tiny_models, maker)(tmp_path / "model"), None, 64)
    n_pairs, n_cut = same_as_slow(encoder, nasty_pairs(encoder.tokenizer, 400, seed=4))
    assert n_pairs == 400 and 30 < n_cut < 380


@pytest.mark.parametrize("maker", ["bert_embedding", "xlm_roberta_embedding", "qwen3_embedding"])
def test_texts_of_embedding_models_give_the_ids_of_transformers(maker, tmp_path):
    encoder = encoder_of(getattr(tiny_models, maker)(tmp_path / "model"), None, 48)
    texts = [pair.document for pair in nasty_pairs(encoder.tokenizer, 300, seed=5)]
    whole = encoder.tokenizer(texts)["input_ids"]
    wanted = encoder.tokenizer(texts, truncation=True, max_length=48)["input_ids"]
    got = encoder.encode_texts(texts)
    assert [prompt.ids for prompt in got] == wanted
    assert [prompt.cut for prompt in got] == [len(ids) > 48 for ids in whole] and any(prompt.cut for prompt in got)


@pytest.mark.parametrize("maker", ["qwen3_reranker", "bert_cross_encoder", "xlm_roberta_cross_encoder"])
def test_token_limits_give_the_texts_and_ids_of_the_service(maker, tmp_path):
    """MAX_TOKENS_PER_QUERY and _DOC: the guard cuts, then vLLM does; offline first_tokens() and encode()."""
    from vllm.entrypoints.pooling.scoring.utils import truncate_text_to_tokens

    template = TEMPLATES["qwen3_reranker"] if "qwen3" in maker else None
    encoder = encoder_of(getattr(tiny_models, maker)(tmp_path / "model"), template, 512)
    pairs = nasty_pairs(encoder.tokenizer, 200, seed=7)
    fitter, n_cut = Fitter(encoder.tokenizer, template, 512), 0
    for n_query, n_doc in ((1, 1), (3, 7), (9, 40)):
        queries = encoder.first_tokens([pair.query for pair in pairs], n_query)
        documents = encoder.first_tokens([pair.document for pair in pairs], n_doc)
        for pair, query, document in zip(pairs, queries, documents, strict=True):
            texts = {"text_1": pair.query, "text_2": pair.document}
            payload = {**texts, "max_tokens_per_query": n_query, "max_tokens_per_doc": n_doc}
            if not payload_fits_surely(fitter, payload):
                fit_payload(fitter, payload)
            served = [
                truncate_text_to_tokens(payload[name], encoder.tokenizer, n)
                for name, n in (("text_1", n_query), ("text_2", n_doc))
            ]
            (here, there), n_cut = encoder.encode([Pair(query, document), Pair(*served)]), n_cut + (query != pair.query)
            assert here.ids == there.ids and not here.cut, (pair, n_query, n_doc)
    assert n_cut > 50


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("else document) ~", "else document | trim) ~"),  # it changes a text
        ("else document) ~", "else document) ~ (query | length) ~"),  # it shows more than the text
        ("macro plain", "macro other"),  # it has no such macro
        ('plain(query) if "<|" in query else query', "'no query'"),
    ],
)
def test_a_template_that_does_more_is_left_to_jinja(old, new, tmp_path):
    tiny_models.qwen3_tokenizer(tmp_path)
    template = TEMPLATES["qwen3_reranker"].replace(old, new)
    if "other" in new:
        template = template.replace("plain(", "other(")
    encoder = encoder_of(tmp_path, template)
    same_as_slow(encoder, nasty_pairs(encoder.tokenizer, 60, seed=6))
    assert encoder._frames[False] is None and encoder._frames[True] is None


class _Tokens:
    """A tokenizer of pairs of characters, which takes texts below 8 characters letter by letter."""

    def encode_batch(self, texts, add_special_tokens):
        assert not add_special_tokens
        self.rounds.append(len(texts))
        return [self.encode(text) for text in texts]

    def encode(self, text):
        step = 2 if len(text) >= 8 else 1
        offsets = [(i, min(i + step, len(text))) for i in range(0, len(text), step)]

        class Encoding(SimpleNamespace):
            def __len__(self):
                return len(self.offsets)

        return Encoding(offsets=offsets, ids=[*range(len(offsets))])


def test_a_cut_text_that_has_more_tokens_alone_is_cut_again():
    encoder = object.__new__(PairEncoder)
    encoder._backend = _Tokens()
    encoder._backend.rounds = []
    assert encoder.first_tokens(["abcdefgh", "xy", "abcdefghij"], 3) == ["abc", "xy", "abc"]
    assert encoder._backend.rounds == [3, 2, 2]  # what fits is not looked at again
