"""Hostile files, made when they are needed: what a case spoils in a good world, which command meets it, how it ends."""

import dataclasses
import hashlib
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.hostile.world import Payload, World, payload

MILLION = 1_000_000
EITHER = "either"


@dataclasses.dataclass(frozen=True)
class Case:
    """`spoil` gets a world of its own and gives the command to call."""

    name: str
    spoil: Callable[[World], list[str]]
    says: str | None
    """A pattern in the one line of the refusal (exit status 2); None: the command succeeds and passes over it.

    `EITHER`: which of the two is the library's to say.
    """


def pickles(marker: Path) -> dict[str, bytes]:
    """Files that run code when they are unpickled, under the names that trainers and libraries give them."""
    raw = payload(marker)
    zipped, legacy, array, arrays = (io.BytesIO() for _ in range(4))
    torch.save(Payload(marker), zipped)
    torch.save(Payload(marker), legacy, _use_new_zipfile_serialization=False)
    objects = np.array([Payload(marker)], dtype=object)
    np.save(array, objects, allow_pickle=True)
    np.savez(arrays, objects, allow_pickle=True)
    return {
        "pytorch_model.bin": zipped.getvalue(),
        "pytorch_model-00001-of-00002.bin": zipped.getvalue(),
        "training_args.bin": zipped.getvalue(),
        "adapter_model.bin": zipped.getvalue(),
        "optimizer.pt": zipped.getvalue(),
        "optimizer.bin": zipped.getvalue(),
        "scheduler.pt": zipped.getvalue(),
        "scaler.pt": legacy.getvalue(),
        "rng_state.pth": legacy.getvalue(),
        "rng_state_0.pth": zipped.getvalue(),
        "random_states_0.pkl": raw,
        "custom_checkpoint_0.pkl": raw,
        "consolidated.00.pth": legacy.getvalue(),
        "model.ckpt": zipped.getvalue(),
        "lit_model.pth": zipped.getvalue(),
        ".metadata": raw,
        "__0_0.distcp": raw,
        "mp_rank_00_model_states.pt": legacy.getvalue(),
        "tokenizer.pkl": raw,
        "tokenizer.pickle": raw,
        "dataset.npy": array.getvalue(),
        "dataset.npz": arrays.getvalue(),
        "state.joblib": raw,
        "events.dill": raw,
        "dummy.pt2": zipped.getvalue(),
    }


def plant(world: World) -> None:
    """Every pickle into every folder that a verb is given."""
    folders = [world.model, world.run, world.run / "model", world.run / "tokenizer", world.checkpoint, world.sources]
    folders += [world.prepared / split for split in ("train", "validation", "train/tokenizer", "validation/tokenizer")]
    for folder in (*folders, world.run / "checkpoints"):
        for name, data in pickles(world.marker).items():
            (folder / name).write_bytes(data)


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, with any length before it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# Ways of spoiling; each gives a function that spoils a world and returns the command.

Spoil = Callable[[World], list[str]]


def put(file: str, data: bytes | Callable[[World], bytes], verb: str = "evaluate") -> Spoil:
    """Another content in place of a file's."""

    def spoil(world: World) -> list[str]:
        path = world.root / file
        content = data(world) if callable(data) else data
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return command(world, verb)

    return spoil


def edited(file: str, verb: str = "evaluate", **changes: Any) -> Spoil:
    """Other values in a JSON file."""

    def spoil(world: World) -> list[str]:
        world.edit(file, **changes)
        return command(world, verb)

    return spoil


def linked(file: str, target: str = "outside/secret.txt", verb: str = "evaluate") -> Spoil:
    """A link in place of a file or a folder; a target without a leading slash is in the world."""

    def spoil(world: World) -> list[str]:
        path = world.root / file
        if path.exists():
            path.rename(world.outside / path.name)
        path.symlink_to(target if target.startswith("/") else world.root / target)
        return command(world, verb)

    return spoil


def piped(file: str, verb: str = "evaluate") -> Spoil:
    """A pipe that nobody writes to."""

    def spoil(world: World) -> list[str]:
        (world.root / file).unlink(missing_ok=True)
        os.mkfifo(world.root / file)
        return command(world, verb)

    return spoil


def pickled_weights(name: str, data: Callable[[World], bytes] | None = None) -> Spoil:
    """A model folder with no other weights than these."""

    def spoil(world: World) -> list[str]:
        (world.model / "model.safetensors").unlink()
        (world.model / name).write_bytes(data(world) if data else pickles(world.marker)["pytorch_model.bin"])
        return command(world, "evaluate")

    return spoil


def from_model(spoil: Spoil, **model: Any) -> Spoil:
    """`spoil`, and then a pretraining that begins from that model folder."""

    def both(world: World) -> list[str]:
        spoil(world)
        world.write_config(path=str(world.model), **model)
        return world.pretrain()

    return both


def shard_named(name: str) -> Spoil:
    """A prepared folder whose index names something else than its own shard."""

    def spoil(world: World) -> list[str]:
        file = world.prepared / "train" / "index.json"
        index = json.loads(file.read_text())
        for place in (world.outside / "shard.bin", world.prepared / "shard.bin"):
            place.write_bytes((world.prepared / "train" / index["shards"][0]["file"]).read_bytes())
        index["shards"][0]["file"] = name.replace("OUTSIDE", str(world.outside))
        file.write_text(json.dumps(index))
        return world.pretrain()

    return spoil


def weights_named(name: str) -> Spoil:
    """A model whose index says that its weights lie somewhere else."""

    def spoil(world: World) -> list[str]:
        (world.model / "model.safetensors").rename(world.outside / "model.safetensors")
        (world.model / "pytorch_model.bin").write_bytes(pickles(world.marker)["pytorch_model.bin"])
        place = name.replace("OUTSIDE", str(world.outside))
        world.edit("model/model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": place})
        return world.evaluate()

    return spoil


def signed(manifest: dict[str, Any]) -> str:
    """A manifest with the checksum that it would have if it were true."""
    manifest = {**manifest, "sha256": None}
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest)


def forged(name: str, data: Callable[[World], bytes], verb: str = "export") -> Spoil:
    """Another file in a checkpoint, and a manifest that says it is right."""

    def spoil(world: World) -> list[str]:
        file, manifest = world.checkpoint / name, world.checkpoint / "manifest.json"
        content = data(world)
        file.write_bytes(content)
        tree = json.loads(manifest.read_text())
        digest = {"bytes": len(content), "crc32": zlib.crc32(content), "sha256": hashlib.sha256(content).hexdigest()}
        tree["files"][name] = digest
        manifest.write_text(signed(tree))
        return [*command(world, verb), *["--checkpoint", "3"] * (verb == "export")]

    return spoil


def manifest_names(name: str) -> Spoil:
    """A manifest that lists a file of somebody else, with its right checksums."""

    def spoil(world: World) -> list[str]:
        content = (world.outside / "secret.txt").read_bytes()
        manifest = world.checkpoint / "manifest.json"
        tree = json.loads(manifest.read_text())
        digest = {"bytes": len(content), "crc32": zlib.crc32(content), "sha256": hashlib.sha256(content).hexdigest()}
        tree["files"][name.replace("OUTSIDE", str(world.outside))] = digest
        manifest.write_text(signed(tree))
        return [*world.export(), "--checkpoint", "3"]

    return spoil


def archive(kind: str, alone: bool) -> Spoil:
    """An archive whose members climb out of any folder, given as a source or lying among the sources."""

    def spoil(world: World) -> list[str]:
        file = world.sources / f"evil.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(file, "w") as members:
                members.writestr("../../outside/escaped.txt", "x")
                members.writestr("/tmp/relora-escaped.txt", "x")
        else:
            with tarfile.open(file, "w:gz" if kind.endswith("gz") else "w") as members:
                for name in ("../../outside/escaped.txt", "/tmp/relora-escaped.txt"):
                    member = tarfile.TarInfo(name)
                    member.size = 1
                    members.addfile(member, io.BytesIO(b"x"))
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, str(world.outside)
                members.addfile(link)
        return [*world.prepare()[:1], str(file), *world.prepare()[2:]] if alone else world.prepare()

    return spoil


def configured(text: str | Callable[[World], str]) -> Spoil:
    """Another text as the configuration."""

    def spoil(world: World) -> list[str]:
        world.config.write_text(text(world) if callable(text) else text)
        return world.check()

    return spoil


def overridden(*overrides: str) -> Spoil:
    return lambda world: [*world.check(), *overrides]


def command(world: World, verb: str) -> list[str]:
    arguments: list[str] = getattr(World, verb)(world)
    return arguments


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


def entries(around: bytes, entry: bytes) -> bytes:
    """JSON of a million numbered entries."""
    return around.replace(b"%s", b",".join(entry % number for number in range(MILLION)))


def weights(world: World) -> bytes:
    return (world.model / "model.safetensors").read_bytes()


def renamed_tensor(world: World) -> bytes:
    """The model's weights, with one tensor more whose name is a path."""
    data = weights(world)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["../../outside/escaped"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    return safetensors(header, data[8 + length :] + b"\0\0\0\0")


def yaml_call(tag: str) -> Callable[[World], str]:
    return lambda world: f"seed: {tag} [{world.marker}]\n{world.config.read_text()}"


JINJA = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for c in [].__class__.__base__.__subclasses__() %}"
    "{% if c.__name__ == 'Popen' %}{{ c(['touch', 'MARKER']) }}{% endif %}{% endfor %}"
    "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}"
)
EVIL_CODE = "import os\nos.mkdir('MARKER')\nclass Evil: pass\ndef generate(*a, **k): os.mkdir('MARKER')\n"


def with_code(**config: Any) -> Spoil:
    """Python files in the model folder, and keys that name them."""

    def spoil(world: World) -> list[str]:
        code = EVIL_CODE.replace("MARKER", str(world.marker))
        (world.model / "custom_generate").mkdir()
        for name in (
            "modeling_evil.py",
            "configuration_evil.py",
            "tokenization_evil.py",
            "custom_generate/generate.py",
        ):
            (world.model / name).write_text(code)
        (world.model / "custom_generate" / "requirements.txt").write_text("evil-package\n")
        for file, changes in config.items():
            world.edit(f"model/{file}.json", **changes)
        return world.generate()

    return spoil


AUTO_MAP = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
REMOTE = {"AutoConfig": "evil/evil--configuration_evil.Evil"}


def cases() -> Iterator[Case]:
    yield from _pickled()
    yield from _configurations()
    yield from _models()
    yield from _weights()
    yield from _tokenizers()
    yield from _prepared()
    yield from _sources()
    yield from _runs()


def _pickled() -> Iterator[Case]:
    for name in pickles(Path("/nowhere")):
        refusal = "pickled" if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) else "has no weights"
        yield Case(f"only {name}", pickled_weights(name, lambda w, name=name: pickles(w.marker)[name]), refusal)
    for file in (
        "model.safetensors",
        "tokenizer.json",
        "config.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        yield Case(f"{file} is a pickle", put(f"model/{file}", lambda w: payload(w.marker)), "/model")
    zipped = put("model/model.safetensors", lambda w: pickles(w.marker)["pytorch_model.bin"])
    yield Case("model.safetensors is a torch file", zipped, "not a safetensors file")
    yield Case("a pickled model to train", from_model(pickled_weights("pytorch_model.bin")), "pickled")
    yield Case("a pickled configuration", put("config.yaml", lambda w: payload(w.marker), "check"), "config.yaml")
    shard = put("prepared/train/shard-00000.bin", lambda w: payload(w.marker), "pretrain")
    yield Case("a pickled shard", shard, "shard-00000.bin: .*the index says")
    for suffix in ("txt", "jsonl", "parquet", "jsonl.gz"):
        yield Case(
            f"a pickled .{suffix}", put(f"sources/x.{suffix}", lambda w: payload(w.marker), "prepare"), f"x.{suffix}"
        )
    for name in ("weights", "optimizer"):
        spoil = forged(f"{name}.safetensors", lambda w: payload(w.marker), "export" if name == "weights" else "resume")
        yield Case(f"a checkpoint's {name} is a pickle with right checksums", spoil, rf"{name}.safetensors")
    yield Case("a checkpoint's state is a pickle", forged("state.json", lambda w: payload(w.marker)), "state.json")


def _configurations() -> Iterator[Case]:
    for tag in (
        "object/apply:os.mkdir",
        "object/new:os.mkdir",
        "name:os.mkdir",
        "module:os",
        "object:os.mkdir",
        "tuple",
    ):
        yield Case(f"YAML tag {tag}", configured(yaml_call(f"!!python/{tag}")), "could not determine a constructor")
    yield Case("YAML tag in an override", overridden("seed=!!python/object/apply:os.mkdir [x]"), "not valid YAML")
    bomb = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(10))
    yield Case("YAML alias bomb", configured(bomb), "line 2: .*alias")
    yield Case("YAML alias bomb in an override", overridden("seed=[&a [x,x], &b [*a,*a], [*b,*b]]"), "alias")
    yield Case("YAML that holds itself", configured("model: &m {preset: *m}\n"), "line 1: .*alias")
    for name, text in (
        ("lists", "[" * 30_000),
        ("maps", "{a: " * 10_000),
        ("dashes", "- " * 30_000),
        ("keys", "? " * 30_000),
    ):
        yield Case(f"YAML of deep {name}", configured(f"seed: {text}" if name in ("lists", "maps") else text), "levels")
    yield Case("an override of many levels", overridden(f"{'a.' * 5_000}b=1"), "levels")
    yield Case("YAML of 10 MB", configured("seed: 0\n" + "# x\n" * 2_600_000), "bytes")
    yield Case("YAML of one huge number", configured(f"seed: {'9' * 20_000}\n"), "config.yaml")
    yield Case("a key twice", configured("seed: 1\nseed: 2\n"), "line 2: .*`seed` stands twice")
    yield Case("a configuration from a pipe", piped("config.yaml", "check"), "not a regular file")
    yield Case("a configuration from a device", lambda world: ["config", "/dev/zero"], "not a regular file")
    yield Case(
        "a model by web address", configured_model("https://reader:hf_secretsecret@hub.example/a/b"), "web address"
    )


def configured_model(path: str) -> Spoil:
    def spoil(world: World) -> list[str]:
        world.write_config(path=path)
        return world.pretrain()

    return spoil


def _models() -> Iterator[Case]:
    yield Case("code beside a model", with_code(), None)
    yield Case("auto_map of a known architecture", with_code(config={"auto_map": AUTO_MAP}), None)
    yield Case(
        "auto_map of an unknown architecture", with_code(config={"auto_map": AUTO_MAP, "model_type": "evil"}), "evil.py"
    )
    yield Case("auto_map to the hub", with_code(config={"auto_map": REMOTE, "model_type": "evil"}), "evil/evil--config")
    yield Case("auto_map in a part", with_code(config={"text_config": {"auto_map": AUTO_MAP}}), "text_config.auto_map")
    yield Case("auto_map that is no map", with_code(config={"auto_map": 7, "model_type": "evil"}), "model")
    yield Case("trust_remote_code in config.json", with_code(config={"trust_remote_code": True}), "trust_remote_code")
    spoil = from_model(with_code(config={"auto_map": AUTO_MAP, "model_type": "evil"}), from_scratch=True)
    yield Case("code to begin from scratch with", spoil, "trust_remote_code: true")
    for key in ("_attn_implementation", "_attn_implementation_internal", "attn_implementation"):
        yield Case(key, edited("model/config.json", **{key: "evil/kernel"}), f"{key}` names 'evil/kernel'")
    for key in ("_experts_implementation", "_experts_implementation_internal", "experts_implementation"):
        yield Case(key, edited("model/config.json", **{key: "deepgemm"}), f"{key}` names")
    parts = {"": "sdpa", "text_config": "evil/kernel"}
    yield Case(
        "an attention for each part", edited("model/config.json", attn_implementation=parts), "attn_implementation"
    )
    for method in ("bitsandbytes", "torchao", "mxfp4", "os.system"):
        changes = {"quant_method": method, "quant_type": "os.system", "load_in_8bit": True}
        yield Case(f"quantized by {method}", edited("model/config.json", quantization_config=changes), "quantized")
    yield Case("compressed", edited("model/config.json", compression_config={"format": "x"}), "quantized")
    for name in (["os.system"], ["../evil"], "os.system", [None], {}):
        yield Case(
            f"architectures {name}",
            edited("model/config.json", architectures=name),
            None if isinstance(name, list) and name != [None] else EITHER,
        )
    for name in (["llama"], {"a": 1}, "../llama", "__class__", ""):
        yield Case(f"model_type {name}", edited("model/config.json", model_type=name), "model")
    yield Case(
        "other weights",
        edited("model/config.json", transformers_weights="../outside/x.safetensors"),
        "transformers_weights",
    )
    yield Case("dtype names a function", edited("model/config.json", dtype="load", torch_dtype="save"), EITHER)
    yield Case("config.json of deep nesting", put("model/config.json", deep(20_000)), "config.json: nested too deeply")
    yield Case("config.json is a list", put("model/config.json", b"[1]"), "not a JSON object")
    huge = put("model/config.json", lambda w: entries(b"{%s}", b'"%d":1'))
    yield Case("config.json of a million entries", huge, "bytes")
    generation = edited(
        "model/generation_config.json", "generate", custom_generate="evil/evil", trust_remote_code=False
    )
    yield Case("custom_generate", generation, None)
    yield Case("an adapter", put("model/adapter_config.json", b'{"base_model_name_or_path": "evil/evil"}'), "adapter")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        yield Case(f"a pipe for {file}", piped(f"model/{file}"), "not a regular file")
        yield Case(f"a link out for {file}", linked(f"model/{file}", f"outside/{file}"), "a link that leads out")
    yield Case("a device for config.json", linked("model/config.json", "/dev/zero"), "a link that leads out")
    yield Case("a link to the reader's file", linked("model/notes.txt"), "a link that leads out")
    yield Case(
        "a folder that is a link out", linked("model/additional_chat_templates", "outside"), "a link that leads out"
    )
    yield Case("a link to itself", linked("model/loop.json", "model/loop.json"), None)
    yield Case(
        "a model of a web address",
        lambda w: ["evaluate", "https://a:hf_secretsecret@b.c/d", *w.evaluate()[2:]],
        "web address",
    )


def _weights() -> Iterator[Case]:
    for name in (
        "OUTSIDE/model.safetensors",
        "../outside/model.safetensors",
        "..",
        "",
        "a/b.safetensors",
        "x\0.safetensors",
    ):
        yield Case(f"an index to {name!r}", weights_named(name), "not a file of this folder")
    yield Case("an index to a pickle", weights_named("pytorch_model.bin"), "not a safetensors file")
    for places in ([], {"a": 1}, {"a": {"b": "c"}}, None):
        spoil = edited("model/model.safetensors.index.json", weight_map=places)
        yield Case(f"an index of {places}", spoil, "not an index of weights")
    index = "model/model.safetensors.index.json"
    million = put(index, lambda w: entries(b'{"weight_map":{%s}}', b'"layers.%d":"model.safetensors"'))
    yield Case("an index of a million entries", million, "bytes")
    yield Case("an index of deep nesting", put(index, deep(100_000)), "nested too deeply")
    for length in (2**60, 2**63, 2**64 - 1, 99_000_000):
        spoil = put("model/model.safetensors", safetensors({}, length=length))
        yield Case(f"a header of {length} bytes", spoil, "not a safetensors file")
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for name, header in (
        ("overlapping", {"a": entry, "b": {**entry, "data_offsets": [4, 12]}}),
        ("negative", {"a": {**entry, "data_offsets": [-8, 0]}}),
        ("beyond the end", {"a": {**entry, "data_offsets": [0, 2**40]}}),
        ("a shape that overflows", {"a": {**entry, "shape": [2**40, 2**40]}}),
        ("an unknown dtype", {"a": {**entry, "dtype": "os.system"}}),
        ("no object", [1]),
    ):
        yield Case(f"a header: {name}", put("model/model.safetensors", safetensors(header, b"\0" * 12)), "model")
    tensor = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    many = put("model/model.safetensors", lambda w: safetensors(entries(b"{%s}", tensor)))
    yield Case("a header of a million tensors", many, "not a safetensors file")
    yield Case("a header of deep nesting", put("model/model.safetensors", safetensors(deep(100_000))), "model")
    yield Case("a tensor named as a path", put("model/model.safetensors", renamed_tensor), None)


def _tokenizers() -> Iterator[Case]:
    file = "model/tokenizer_config.json"
    mapped = with_code(tokenizer_config={"auto_map": {"AutoTokenizer": [None, "tokenization_evil.Evil"]}})
    yield Case("a tokenizer's auto_map", mapped, "tokenizer_config.json: `auto_map`")
    for name in ("RagRetriever", "AutoModelForCausalLM", "Trainer", "pipeline", "__version__", "models"):
        yield Case(f"tokenizer_class {name}", edited(file, tokenizer_class=name), "not a tokenizer of transformers")
        yield Case(
            f"config.json's tokenizer_class {name}",
            edited("model/config.json", tokenizer_class=name),
            "not a tokenizer",
        )
    for name in (["RagRetriever"], {"a": 1}, 7):
        yield Case(f"tokenizer_class {name}", edited(file, tokenizer_class=name), "not a tokenizer of transformers")
    yield Case("tokenizer_class os.system", edited(file, tokenizer_class="os.system"), None)
    for key in ("vocab_file", "merges_file", "gguf_file", "spm_file"):
        yield Case(f"{key} elsewhere", edited(file, **{key: "../outside/secret.txt"}), "not a file of this folder")
    versions = ["../../outside/tokenizer.4.0.0.json"]
    yield Case(
        "fast_tokenizer_files elsewhere", edited(file, fast_tokenizer_files=versions), "not a file of this folder"
    )
    template = edited(file, "generate", chat_template=JINJA)
    yield Case("a chat template that climbs", template, None)
    yield Case("a chat template in a file", put("model/chat_template.jinja", JINJA.encode(), "generate"), None)
    yield Case(
        "a chat template of many", put("model/additional_chat_templates/x.jinja", JINJA.encode(), "generate"), None
    )
    yield Case("tokenizer.json of deep nesting", put("model/tokenizer.json", deep(100_000)), "model")
    yield Case("tokenizer.json of 60 MB", put("model/tokenizer.json", b" " * 60_000_000), "bytes")
    yield Case("tokenizer_config.json of 10 MB", put(file, b'{"a": "' + b"x" * 10_000_000 + b'"}'), "bytes")
    yield Case("a pipe for tokenizer.json", piped("model/tokenizer.json", "prepare"), "not a regular file")
    yield Case("a link out for tokenizer.json", linked("model/tokenizer.json", verb="prepare"), "a link that leads out")


def _prepared() -> Iterator[Case]:
    for name in ("OUTSIDE/shard.bin", "../../outside/shard.bin", "../shard.bin", "..", "", "a\0b"):
        yield Case(f"a shard named {name!r}", shard_named(name), "not a file of this folder")
    shard, index = "prepared/train/shard-00000.bin", "prepared/train/index.json"
    yield Case(
        "a shard that is a link out", linked(shard, "outside/shard-00000.bin", "pretrain"), "a link that leads out"
    )
    yield Case("a pipe for a shard", piped(shard, "pretrain"), "not a regular file")
    yield Case("a pipe for an index", piped(index, "pretrain"), "not a regular file")
    yield Case("a prepared index of deep nesting", put(index, deep(100_000), "pretrain"), "not an index")
    million = put(
        index, lambda w: entries(b'{"format_version":1,"shards":[%s]}', b'{"file":"%d","tokens":1}'), "pretrain"
    )
    yield Case("a prepared index of a million shards", million, "bytes")
    tokenizer = "prepared/validation/tokenizer"
    yield Case(
        "a link out in its tokenizer", linked(f"{tokenizer}/notes.txt", verb="pretrain"), "a link that leads out"
    )
    mapped = edited(f"{tokenizer}/tokenizer_config.json", "pretrain", auto_map={"AutoTokenizer": ["a.B", "a.B"]})
    yield Case("code in its tokenizer", mapped, "auto_map")


def _sources() -> Iterator[Case]:
    for kind in ("tar", "tar.gz", "zip"):
        yield Case(f"{kind} as a source", archive(kind, alone=True), "not a kind of file")
        yield Case(f"{kind} among the sources", archive(kind, alone=False), None)
    yield Case("a pipe among the sources", piped("sources/x.txt", "prepare"), None)
    info = put("sources/dataset_info.json", b'{"features": {"text": {"_type": "os.system"}}}', "prepare")
    yield Case(
        "a saved dataset of odd types",
        lambda w: [(w.sources / "state.json").write_text("{}"), info(w)][1],
        "saved dataset",
    )


def _runs() -> Iterator[Case]:
    for name in ("OUTSIDE/secret.txt", "../../../outside/secret.txt", "/etc/passwd"):
        yield Case(f"a manifest that names {name}", manifest_names(name), "manifest.json: ")
    yield Case("a pipe for config.yaml of a run", piped("run/config.yaml", "export"), EITHER)
    yield Case(
        "a run whose figures are a link out",
        linked("run/metrics.jsonl", "outside/metrics.jsonl", "report"),
        "a link that leads out",
    )
    yield Case(
        "a report that is a link out",
        linked("run/report.html", "outside/secret.txt", "report"),
        "a link that leads out",
    )
    yield Case(
        "a run whose checkpoints are a link out",
        linked("run/checkpoints", "outside/checkpoints", "export"),
        "a link that leads out",
    )
    yield Case(
        "a run whose tokenizer is a link out",
        linked("run/tokenizer", "outside/tokenizer", "export"),
        "a link that leads out",
    )
    yield Case(
        "a run to continue with a link out",
        linked("run/restarts.jsonl", "outside/secret.txt", "resume"),
        "a link that leads out",
    )
