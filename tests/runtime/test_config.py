"""The config loader: what it accepts, what it refuses and how it says so, and the way back to text."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest

from runtime import toml
from runtime.config import diff, flatten, load, parse_args, to_toml
from runtime.errors import ConfigError
from runtime.schema import section
from runtime.suggest import _everywhere, suggest
from tests.runtime.sample import MINIMAL, Columns, Constant, Cosine, Data, Lora, Model, Optim, Sample, Save, Source
from tests.typos import campaign, typos
from train import RunConfig


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "x.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Like `write`, for thousands of texts: the file exists in memory only."""

    def pretend(text: str | bytes):
        monkeypatch.setattr(toml, "_bytes", lambda path, where: text if isinstance(text, bytes) else text.encode())
        return tmp_path / "x.toml"

    return pretend


def error_of(path, *overrides) -> str:
    """The message, with the path's folder taken out."""
    with pytest.raises(ConfigError) as caught:
        load(Sample, path, overrides)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    return text.replace(f"{path.parent}/", "")


def test_defaults_and_values(write):
    cfg = load(Sample, write(MINIMAL + 'columns.text = "t"\n[optim]\nlr = 1\n[lora]\ntargets = ["q", "k"]\nstages = [[1], []]\n'))
    assert cfg.model == Model("m") and cfg.lora == Lora(targets=("q", "k"), stages=((1,), ()))
    assert cfg.data == Data((Source("a.jsonl", columns=Columns("t")),)) and cfg.schedule == Cosine()
    assert type(cfg.optim.lr) is float
    assert load(Sample, write(MINIMAL)).lora is None
    assert load(Sample, write(MINIMAL + "[lora]\n")).lora == Lora()
    assert load(Sample, write(MINIMAL + "[checkpoint]\nasync = true\n")).checkpoint == Save(async_=True)
    assert load(Sample, write(MINIMAL + '[schedule]\nkind = "constant"\n')).schedule == Constant()
    assert load(Sample, write(MINIMAL + "[schedule]\nmin = 0.5\n")).schedule == Cosine(min=0.5), "an absent kind is the default's"
    assert load(Sample, write("\ufeff" + MINIMAL.replace("\n", "\r\n"))) == load(Sample, write(MINIMAL)), "as Windows editors save it"


# Lines of a config that is right otherwise, and the message; the number is the line among these.
WRONG_LINES = [
    ("[optim]\nlrr = 1", "2: optim.lrr: no such key; did you mean optim.lr?"),
    ("[optm]\nlr = 1", "1: optm: no such key; did you mean optim?"),
    ("[checkpoint]\nlr = 1", "2: checkpoint.lr: no such key; did you mean optim.lr?"),
    ("[optim]\nlearning_rate = 1", "2: optim.learning_rate: no such key; did you mean optim.lr?"),
    ("[optim]\nLearning-Rate = 1", "2: optim.Learning-Rate: no such key; did you mean optim.lr?"),
    ("[data]\nbatch_size = 1", "2: data.batch_size: no such key; did you mean data.tokens?"),
    ("[optim]\nxqzw = 1", "2: optim.xqzw: no such key; [optim] has lr, max_norm"),
    ("[[data.sources]]\n\nweigth = 1", "3: data.sources.1.weigth: no such key; did you mean data.sources.1.weight?"),
    ("[[data.sources]]\nweight = 1", '1: data.sources.1.path: missing (A file); write path = "text" under [[data.sources]]'),
    ("[schedule]\nkind = 'constant'\nmin = 0.1", '3: schedule.min: is not a key of kind = "constant", but of "cosine"'),
    ("[schedule]\nkind = 'cosin'", """2: schedule.kind='cosin' must be "constant" or "cosine"; did you mean "cosine"?"""),
    ("[schedule]\nkind = ['cosine']", """2: schedule.kind=['cosine'] must be "constant" or "cosine"; e.g. kind = "constant\""""),
    ("[lora]\nrank = '16'", "2: lora.rank='16' must be an integer; write rank = 16"),
    ("[lora]\nrank = 1e3", "2: lora.rank=1000.0 must be an integer; write rank = 1000"),
    ("[lora]\nrank = 1.5", "2: lora.rank=1.5 must be an integer; e.g. rank = 16"),
    ("[lora]\nrank = true", "2: lora.rank=true must be an integer; e.g. rank = 16"),
    ("[lora]\nstages = [[1], [2, 'x']]", "2: lora.stages.1.1='x' must be an integer; e.g. 1"),
    ("[lora]\ntargets = 3", '2: lora.targets=3 must be a string or an array of strings; write targets = "3"'),
    ("[lora]\ntargets = [\n 'a',\n 3]", '4: lora.targets.1=3 must be a string; write "3"'),
    ("[optim]\nlr = '2e-4'", "2: optim.lr='2e-4' must be a number; write lr = 0.0002"),
    ("[optim]\nlr = 1979-05-27", "2: optim.lr=1979-05-27 must be a number; e.g. lr = 0.0002"),
    ("[optim]\nlr = inf", "2: optim.lr: is inf; only finite numbers are accepted"),
    ("[lora]\nrank = 9223372036854775808", "2: lora.rank: is an integer outside 64 bits"),
    ("[checkpoint]\nasync = 'True'", "2: checkpoint.async='True' must be true or false; write async = true"),
    ("[[optim]]\nlr = 1", "1: optim: is a table: write [optim] and its keys below"),
    ("[lora]\nrank = 0", "2: lora.rank=0 must be at least 1"),
    ("[lora]\n[optim]\nlr = 2", "3: optim.lr=2.0 is too high for LoRA"),
    ("weight = -1", "1: data.sources.0.weight=-1.0 must be positive"),
]


@pytest.mark.parametrize("lines, expected", WRONG_LINES)
def test_one_line_with_the_place_and_the_fix(write, lines, expected):
    number, _, message = expected.partition(": ")
    assert error_of(write(MINIMAL + lines)) == f"x.toml:{MINIMAL.count(chr(10)) + int(number)}: {message}"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("lr = 1", ":1: lr: no such key; did you mean optim.lr?"),
        ("[model]\npath = 3", ':2: model.path=3 must be a string; write path = "3"'),
        ("[model]\npath = \"\"\ninit = 'rnadom'", """:3: model.init='rnadom' must be "pretrained" or "random"; did you mean "random"?"""),
        ('[model]\npath = "a\\u0000b"', ":2: model.path: contains a NUL character"),
        ("[model]\ninit = 'random'", ':1: model.path: missing (A model folder); write path = "text" under [model]'),
        ("[model]\npath = 'm'", ": data.sources: missing; add at least one [[data.sources]]"),
        ("model = 'm'", ":1: model: is a table: write [model] and its keys below"),
        ("[model]\npath = 'm'\n[data.sources]\npath = 'x'", ":3: data.sources: is an array of tables: write [[data.sources]]"),
        ("[model]\npath = 'm'\n[data]\nsources = ['x']", ":4: data.sources.0: is a table: write [[data.sources]] and its keys below"),
        ("a = ", ":1: is not valid TOML: invalid value; text needs quotes"),
        ("\n\na = b c", ":3:5: is not valid TOML: invalid value; text needs quotes"),
        ("a = 1\na = 2", ":2: is not valid TOML: cannot overwrite a value"),
        ("[lora]\nrank = 1" + "0" * 5000, ": holds an integer outside 64 bits"),
        ("a = " + "[" * 65, ":1: is nested deeper than 64 levels"),
        ("\n" + "a." * 65 + "b = 1", ":2: is nested deeper than 64 levels"),
        ("\n" + "a." * 40 + "b = " + "{a = " * 40 + "1" + "}" * 40, ":2: a.a.a. ...: is nested deeper than 64 levels"),
        (b'[model]\npath = "\xff"', ":2: byte 0xff is not UTF-8; save the file as UTF-8"),
        (b" " * (toml.MAX_BYTES + 1), ": is larger than 1048576 bytes, which no config needs"),
        ("extends = 3", ':1: extends=3 must be the path of a config, e.g. extends = "base.toml"'),
        ('extends = "a\\u0000"', ":1: extends: contains a NUL character"),
    ],
    ids=range(20),
)
def test_one_line_about_a_whole_file(write, text, expected):
    assert error_of(write(text)) == f"x.toml{expected}"


def test_unreadable_files(tmp_path):
    for path in (tmp_path / "no.toml", tmp_path):
        with pytest.raises(ConfigError, match=r"no such file|it is no regular file"):
            load(Sample, path)


def test_extends(write):
    base = write(MINIMAL + '[lora]\nrank = 4\ntargets = ["q", "k"]\n[schedule]\nmin = 0.5\nkind = "cosine"\n', "base.toml")
    cfg = load(Sample, write('extends = "base.toml"\n[lora]\ntargets = ["v"]\n[[data.sources]]\npath = "b"\n'))
    assert cfg.lora == Lora(rank=4, targets=("v",)) and [s.path for s in cfg.data.sources] == ["b"]
    assert load(Sample, write('extends = "base.toml"\n[schedule]\nkind = "constant"\n')).schedule == Constant()
    assert load(Sample, write('extends = "base.toml"\n[schedule]\nwarmup = 0.5\n')).schedule == Cosine(warmup=0.5, min=0.5)
    assert load(Sample, write('extends = "base.toml"\n'), ["--lora=none"]).lora is None
    # each error names the file that the value stands in
    assert error_of(write('extends = "base.toml"\n[lora]\nalpha = "x"\n')).startswith("x.toml:3: lora.alpha")
    base.write_text(MINIMAL + "[lora]\nrank = 0\n")
    assert error_of(write('extends = "base.toml"\n[lora]\nalpha = 1\n')) == "base.toml:7: lora.rank=0 must be at least 1"
    assert error_of(write('extends = "base.toml"\n[[data.sources]]\nweight = 1\n')).startswith("x.toml:2: data.sources.0.path: missing")
    # one parent at most
    write('extends = "base.toml"', "middle.toml")
    assert "only one parent is allowed" in error_of(write('extends = "middle.toml"'))
    assert "only one parent is allowed" in error_of(write('extends = "x.toml"'))
    assert "x.toml:1: extends='gone.toml' cannot be used: gone.toml: there is no such file" in error_of(write('extends = "gone.toml"'))


def test_extends_is_relative_to_the_file(write, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(MINIMAL, "sub/base.toml")
    path = write('extends = "base.toml"', "sub/x.toml")
    monkeypatch.chdir("/")
    assert load(Sample, path).model.path == "m"


@pytest.mark.parametrize(
    "override, key, expected",
    [
        ("--model.path=foo/bar", "model.path", "foo/bar"),
        ("--model.path=2024-01-01", "model.path", "2024-01-01"),
        ("--model.path=true", "model.path", "true"),
        ("--model.path=a=b", "model.path", "a=b"),
        ("--model.path=", "model.path", ""),
        ('--model.path="quoted"', "model.path", "quoted"),
        ("--model.init=random", "model.init", "random"),
        ("--model.revision=none", "model.revision", None),
        ('--model.revision="none"', "model.revision", "none"),
        ("--optim.lr=1e-4", "optim.lr", 1e-4),
        ("--optim.max_norm=1", "optim.max_norm", 1.0),
        ("--lora.rank=8", "lora.rank", 8),
        ('--lora.targets=["q","k"]', "lora.targets", ["q", "k"]),
        ("--lora.targets=q", "lora.targets", "q"),
        ("--lora={rank = 3}", "lora.rank", 3),
        ("--data.sources.0.path=z", "data.sources.0.path", "z"),
        ("--data.sources.1.path=z", "data.sources.1.path", "z"),
        ("--data.sources.0.columns.rename.a=3", "data.sources.0.columns.rename.a", 3),
        ("--data.sources.0.columns.rename.a=b", "data.sources.0.columns.rename.a", "b"),
        ('--data.sources=[{path = "z", weight = 2}]', "data.sources.0.weight", 2.0),
        ("--data.extra.0.path=z", "data.extra.0.path", "z"),
        ("--checkpoint.async=true", "checkpoint.async", True),
        ('--schedule={kind = "constant"}', "schedule.kind", "constant"),
        ("--title=x y", "title", "x y"),
    ],
)
def test_overrides(write, override, key, expected):
    flat = flatten(load(Sample, write(MINIMAL), [override]))
    assert flat.get(key) == expected and type(flat.get(key)) is type(expected)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("--optim.lrr=1", "command line: --optim.lrr: no such key; did you mean --optim.lr?"),
        ("--optm.lr=1", "command line: --optm.lr: no such key; did you mean --optim.lr?"),
        ("--optm.lrr=1", "command line: --optm.lrr: no such key; did you mean --optim.lr?"),
        ("--lr=1", "command line: --lr: no such key; did you mean --optim.lr?"),
        ("--data.source.0.pth=1", "command line: --data.source.0.pth: no such key; did you mean --data.sources.0.path?"),
        ("--zzz=1", "command line: --zzz: no such key; the top level has model, data, title, lora, optim, schedule, checkpoint"),
        ("--optim.lr=abc", "command line: optim.lr='abc' must be a number; e.g. --optim.lr=0.0002"),
        ('--lora.rank="3"', "command line: lora.rank='3' must be an integer; write --lora.rank=3"),
        ("--lora.stages=3", "command line: lora.stages=3 must be an array of values; e.g. '--lora.stages=[]'"),
        ('--lora.targets=["a", 3]', 'command line: lora.targets.1=3 must be a string; write "3"'),
        (
            "--lora.targets=[a]",
            "command line: --lora.targets='[a]' is not valid TOML; shells take quotes and brackets for themselves: "
            "put the whole override in single quotes",
        ),
        ("--lora=abc", "command line: --lora='abc' is not its value: lora is a section, set keys in it: --lora.key=value"),
        ("--data.sources.path=x", "command line: --data.sources.path: elements have an index: --data.sources.0.path"),
        ("--data.sources.7.path=x", "command line: --data.sources.7: no such element; the next free index is 1"),
        ("--data.sources.1.weight=2", "command line: data.sources.1.path: missing (A file); write --data.sources.1.path=text"),
        ("--lora.rank.x=3", "command line: --lora.rank.x: lora.rank has no keys of its own; give its whole value"),
        ("--schedule.kind=constant --schedule.min=0", 'command line: schedule.min: is not a key of kind = "constant", but of "cosine"'),
        ("--model.path=\udcff", "command line: --model.path: is not UTF-8"),
        ("--lora.rank=99999999999999999999", "command line: lora.rank: is an integer outside 64 bits"),
        ("--lora.rank=1\n[model]", "command line: lora.rank='1\\n[model]' must be an integer; e.g. --lora.rank=16"),
        ("--optim.lr", "command line: --optim.lr: write --optim.lr=VALUE, with two dashes and '='"),
        ("-optim.lr=1", "command line: -optim.lr=1: write --optim.lr=1, with two dashes and '='"),
        ("--schedule=3", "command line: schedule: is a table: write [schedule] and its keys below"),
    ],
)  # fmt: skip
def test_wrong_overrides(write, override, expected):
    assert error_of(write(MINIMAL), *override.split(" --")[:1], *(f"--{o}" for o in override.split(" --")[1:])) == expected


def test_an_override_takes_the_blame_for_what_it_replaces(write):
    path = write(MINIMAL + "[lora]\nrank = 4\n")
    assert error_of(path, "--lora.rank=0") == "command line: lora.rank=0 must be at least 1"
    assert error_of(path, '--data.sources=[{pth = "x"}]').startswith("command line: --data.sources.0.pth: no such key; did you mean")


def test_override_into_a_value_of_another_shape(write):
    assert error_of(write("lora = 3\n" + MINIMAL), "--lora.rank=3") == "x.toml:1: lora=3 must be a table"
    assert "must be an array of tables" in error_of(write("[data]\nsources = 3\n"), "--data.sources.0.path=x")


def test_command_line(write, capsys):
    path = str(write(MINIMAL))
    assert parse_args(Sample, ["--config", path, "--optim.lr=1"]) == parse_args(Sample, [f"--config={path}", "--optim.lr=1.0"])
    for argv, expected in [
        ([], "--config is missing"),
        (["--config"], "--config is missing"),
        ([path], "--config is missing"),
        (["--confg", path], "--config is missing"),
        (["--config", path, "--config", path], "--config is given more than once"),
        (["--config", path, "--optim.lr", "3"], "write --optim.lr=3, with two dashes"),
        (["--config", path, "--optim.lrr", "3"], "did you mean --optim.lr?"),
        (["--config", path, "optim.lr=3"], "write --optim.lr=3, with two dashes"),
        (["--config", path, "more"], "'more' is not an option"),
        (["--config", path, "--parallel.shard", "-1"], "no such key"),
        (["--config", path, "--lora.rank", "-1"], "write --lora.rank=-1"),
    ]:
        with pytest.raises(ConfigError) as caught:
            parse_args(Sample, argv)
        assert expected in str(caught.value), argv
    with pytest.raises(SystemExit) as end:
        parse_args(Sample, ["--config", path, "--help"])
    assert end.value.code == 0 and "--lora.rank" in capsys.readouterr().out


@pytest.mark.parametrize("cls, ambiguous", [(Sample, set()), (RunConfig, {"beta1", "beta2"})])
def test_every_typo_of_every_key(cls, ambiguous):
    """At least 99 % of all single-edit typos get the right suggestion first, and none is a legal key."""
    root = section(cls)
    keys = _everywhere(root)
    tried = right = 0
    for place in keys:
        siblings = {other[-1] for other in keys if other[:-1] == place[:-1]}
        edits = typos(place[-1])
        assert edits & siblings <= ambiguous
        for typo in edits - siblings:
            tried += 1
            right += suggest(root, (*place[:-1], typo))[:1] == [place]
    print(f"{cls.__name__}: {right} of {tried} = {right / tried:.4%} over {len(keys)} keys")
    assert tried > 5000 and right / tried >= 0.99


@pytest.mark.parametrize("each", [5, pytest.param(None, marks=pytest.mark.slow)])
def test_every_typo_through_the_loader(each):
    """A file of a run with one key mistyped: always an error that names the key, nearly always one that names the right one alone.

    By default `each` typos of a key, with `-m slow` all of them; benchmarks/results/typos.json has the counts of these.
    """
    counts = campaign(each)
    print(counts)
    assert counts["accepted"] == 0
    assert counts["typos"] > 500 and counts["share"] >= 0.99


@pytest.mark.parametrize("typo", ["l", "r", "rl", "lx", "xr", "lrr", "xlr", "lxr", "LR"])
def test_typos_of_a_short_key(typo):
    """One edit of two characters is half of the word: similarity alone would miss these."""
    assert suggest(section(Sample), ("optim", typo)) == [("optim", "lr")]


def test_no_typo_is_accepted(pretend):
    """Through the loader: every deletion, swap and some substitutions of every key of a full config."""
    text = to_toml(full())
    lines = text.splitlines()
    tried = 0
    for i, line in enumerate(lines):
        key = line.split(" = ")[0].strip("[]").split(".")[-1]
        if not key:
            continue
        for typo in typos(key, "xe_"):
            changed = line.replace(key, typo, 1) if " = " in line else line[: line.rindex(key)] + typo + line[line.rindex(key) + len(key) :]
            if "rename" in "".join(lines[max(0, i - 1) : i + 1]):
                continue  # a table of the user's own keys
            with pytest.raises(ConfigError):
                load(Sample, pretend("\n".join([*lines[:i], changed, *lines[i + 1 :]])))
            tried += 1
    assert tried > 500


def full() -> Sample:
    columns = Columns("t", {"a b": "c"})
    return Sample(
        Model("m", revision="r"), Data((Source("a", columns=columns),), extra=(Source("b"),)), lora=Lora(), optim=Optim(max_norm=1.0)
    )


HOSTILE = [
    "", " ", "none", "true", "1e5", "a.b", "a=b", "#", "[x]", '"', "'", '"""', "'''", "\\", "\\n", "\n", "\r\n", "\t", "\x7f", "\x01",
    "\x1f", "\u0085", "\u2028", "é", "日本", "😀", "\ufeff", "\ufffe", "a" * 3000, "${env:HOME}", "\\u0041", "C:\\x",
]  # fmt: skip
FLOATS = [0.0, -0.0, 1e-45, 5e-324, 1.7976931348623157e308, 1e16, 1e22, 123456789.123456789, 0.1, 2e-4, -1.5, 3.0]


def test_to_toml_round_trips(pretend):
    rng = random.Random(0)

    def text() -> str:
        return (
            rng.choice(HOSTILE)
            if rng.random() < 0.7
            else "".join(chr(rng.choice((rng.randrange(1, 128), rng.randrange(0xE000, 0x11000)))) for _ in range(5))
        )

    def number() -> float:
        return rng.choice(FLOATS) if rng.random() < 0.7 else rng.uniform(-1, 1) * 10 ** rng.randrange(-300, 300)

    def maybe(make):
        return make() if rng.random() < 0.5 else None

    def many(make) -> tuple:
        return tuple(make() for _ in range(rng.randrange(4)))

    def source() -> Source:
        rename = {text(): rng.choice((text(), number(), rng.randrange(-(2**63), 2**63), True, False)) for _ in range(rng.randrange(3))}
        return Source(text(), abs(number()) or 1.0, Columns(text(), rename))

    def lora() -> Lora:
        stages = many(lambda: many(lambda: rng.randrange(-9, 9)))
        return Lora(rng.randrange(1, 2**63), number(), rng.choice((text(), many(text))), stages)

    for _ in range(800):
        cfg = Sample(
            Model(text(), rng.choice(("pretrained", "random")), maybe(text)),
            Data(many(source), rng.randrange(-(2**63), 2**63), maybe(lambda: many(source))),
            text(),
            maybe(lora),
            Optim(rng.uniform(0, 1), maybe(number)),
            rng.choice((Constant(), Cosine(min=number()), Constant(warmup=number()))),
            Save(rng.randrange(9), rng.random() < 0.5),
        )
        again = load(Sample, pretend(to_toml(cfg)))
        assert again == cfg and repr(again) == repr(cfg)
        assert diff(flatten(cfg), flatten(again)) == []
    assert to_toml(cfg) == to_toml(again)


def test_flatten_and_diff():
    old = full()
    new = replace(old, lora=None, optim=Optim(lr=1e-3, max_norm=1.0), data=replace(old.data, sources=(Source("z"), Source("b"))))
    assert flatten(old)['data.sources.0.columns.rename."a b"'] == "c"
    assert diff(flatten(old), flatten(old)) == []
    changes = {key: (a, b) for key, a, b in diff(flatten(old), flatten(new))}
    assert changes["optim.lr"] == (2e-4, 1e-3) and changes["lora.rank"] == (16, None)
    assert changes["data.sources.0.path"] == ("a", "z") and changes["data.sources.1.path"] == (None, "b")


def test_bombs_are_refused_quickly(write):
    """At the size limit, inputs on which a parser or a scanner could recurse or take quadratic time."""
    size = toml.MAX_BYTES - 100
    bombs = ["a." * (size // 2), "[" * size, "{a=" * (size // 3), '"""\\' * (size // 4), "'''" * (size // 3 - 2), '"' * size]
    bombs += ["a = 1" + "0" * size, "a = [" + "1," * (size // 8) + "]", "\n".join(f"k{i} = 1" for i in range(size // 48))]
    for text in bombs:
        path = write(text)
        began = time.perf_counter()
        with pytest.raises(ConfigError):
            load(Sample, path)
        assert time.perf_counter() - began < 20, text[:20]


def test_a_config_reaches_no_code(write):
    """Names resolve in the closed set of dataclasses: no key imports, formats or evaluates what it says."""
    for text in (
        "__class__ = 1",
        "[model.__init__]\nx = 1",
        "model.cls = 'os.system'",
        '[schedule]\nkind = "builtins.eval"',
        "[optim]\n_target_ = 'x'",
    ):
        with pytest.raises(ConfigError):
            load(Sample, write(text))
    with pytest.raises(ConfigError):
        load(Sample, write(MINIMAL), ["--model.__class__=x"])
    assert load(Sample, write(MINIMAL.replace('"m"', '"{0.__class__} %s ${HOME} $(id)"'))).model.path == "{0.__class__} %s ${HOME} $(id)"


def test_no_secret_gets_into_a_config_or_a_message(write, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    for text in ("planted-token", "org/planted-token/x", "https://me:planted@host/x", "hf_" + "planted" * 5):
        for message in (
            error_of(write(MINIMAL), f"--lora.targets={text}"),
            error_of(write(MINIMAL), f'--lora.targets=["q", "{text}"]'),
            error_of(write(MINIMAL.replace('"m"', f'"{text}"'))),
        ):
            assert "planted" not in message and "holds a secret" in message
    for override in ("--optim.lr=planted-token", "--schedule.kind=planted-token", "--lora.targets=[planted-token", "planted-token"):
        assert "planted" not in error_of(write(MINIMAL), override)
    assert load(Sample, write(MINIMAL), ["--model.path=planted/tokenizer"]).model.path == "planted/tokenizer"
