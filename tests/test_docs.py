"""Every page is true: its blocks run, its output comes, its tables match the code, its links lead somewhere.

Conventions for README.md and docs/*.md, invisible to the reader. All blocks of a page run in its order, in one
temporary directory (which holds `client/samples`):

* ```python   in one interpreter a page, warnings as errors; a block with `import tritonclient` alone in the stock
              client's environment
* ```sh       with `bash -e`; ```console too, its lines without `$ ` being the output
* ```toml     must be settings of the server (of a model, as a file in a model's folder); ```json must parse
* ```text     directly below a block that runs is its output: line by line, any run of blanks alike, `…` or `...` for
              anything, a line of nothing but `…` for any number of lines. Elsewhere it is only shown, as promql, proto

and a comment above a block, or above the first one, changes that:

* <!-- server -->            the page talks to a server: one with the zoo runs, its ports in place of 8001, 8000, 8002
* <!-- server: watch = 1 --> the same, with a server of the page's own that has these settings
* <!-- file: net.py -->      the block is the content of this file
* <!-- until: ready in -->   the block runs until it prints this, gets Ctrl-C, and must then end with 0
* <!-- not run: reason -->   the block can't run in a test
"""

import json
import tomllib
import urllib.request
from collections.abc import Iterator
from inspect import signature
from itertools import takewhile
from pathlib import Path

import documentation
import grpc
import pytest
from documentation import ROOT, table
from documentation_run import Surroundings, run
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from serving import Running, running

from layercast import client
from layercast.models import zoo
from layercast.models.artefact import module_from_card
from layercast.models.explain import METHODS
from layercast.models.export.writer import export_artefact
from layercast.models.reducers import REDUCERS
from layercast.proto.rpc import FEATURES, INFERENCE
from layercast.proto.tensors import BFLOAT16, DATATYPES
from layercast.server.gpus import Gpus
from layercast.server.settings import ModelSettings, Settings

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def zoo_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained models that the pages speak of, without programs: writing those takes most of an export's time."""
    root = tmp_path_factory.mktemp("zoo")
    for name in zoo.names():
        folder = zoo.directory(name)
        card = json.loads((folder / "card.json").read_text())
        export_artefact(module_from_card(folder), card, root / name / "1", programs=())
    return root


@pytest.fixture(scope="module")
def zoo_served(zoo_repository: Path) -> Iterator[Running]:
    with running(zoo_repository) as server:
        yield server


@pytest.fixture
def own_served(path: Path, zoo_repository: Path) -> Iterator[Running]:
    with running(zoo_repository, **tomllib.loads(documentation.parse(path).settings)) as server:
        yield server


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_every_block_of_the_page_does_what_it_says(
    path: Path, zoo_repository: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page = documentation.parse(path)
    ports = {}
    if page.needs_server:
        server = request.getfixturevalue("own_served" if page.settings else "zoo_served").server
        ports = {"grpc": server.grpc_port, "http": server.http_port, "metrics": server.metrics_port}
    stock = request.getfixturevalue("stock_python") if page.needs_tritonclient else ""
    run(page, Surroundings(tmp_path, zoo_repository, ports, stock))


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_every_link_of_the_page_leads_somewhere(path: Path) -> None:
    assert documentation.broken_links(path) == []


def test_the_index_names_every_page() -> None:
    text = (DOCS / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if page.name != "README.md" and f"({page.name})" not in text] == []


def test_few_blocks_are_not_run() -> None:
    blocks = [(path, block) for path in PAGES for block in documentation.parse(path).blocks]
    runnable = [block for _, block in blocks if block.language in documentation.RUN]
    left = [f"{named(path)}:{block.line}: {block.argument}" for path, block in blocks if block.directive == "not run"]
    assert len(left) <= len(runnable) / 5, "\n".join(left)


# What must not pass: a page, and words of the complaint.
BROKEN = {
    "an exception": ("```python\nx = 1\n\n1 / 0\n```", r"page\.md:2: .*line 4.*ZeroDivisionError"),
    "a warning": ("```python\nimport warnings\nwarnings.warn('old')\n```", "UserWarning"),
    "an end": ("```python\nimport os\nos._exit(3)\n```", "ended with 3"),
    "a failing command": ("```sh\nfalse\ntrue\n```", "exit code 1"),
    "a failing pipe": ("```console\n$ false | cat\n```", "exit code 1"),
    "other output": ("```python\nprint(1)\n```\n\n```text\n2\n```", "the page says"),
    "one line more": ("```python\nprint('a\\nb')\n```\n```text\na\n```", "the page says"),
    "other console output": ("```console\n$ echo a\nb\n```", "the page says"),
    "no reason": ("<!-- not run -->\n```sh\nfalse\n```", "says no more"),
    "an unknown comment": ("<!-- skip -->\n```sh\nfalse\n```", "none of"),
    "an unknown language": ("```shell\nfalse\n```", "no rule"),
    "an unknown setting": ("```toml\nmax_bath = 3\n```", "did you mean 'max_batch'"),
    "a server's setting for a model": ("<!-- file: models/mnist/layercast.toml -->\n```toml\nhost = 'a'\n```", "host"),
    "bad JSON": ('```json\n{"a": }\n```', "Expecting value"),
    "text that never comes": ("<!-- until: ready -->\n```sh\necho steady\n```", "never came"),
}


@pytest.mark.parametrize(("text", "complaint"), BROKEN.values(), ids=BROKEN)
def test_a_page_that_is_wrong_fails(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(text)
    around = Surroundings(tmp_path / "directory", tmp_path, {})
    with pytest.raises(AssertionError, match=f"(?s){complaint}"):
        run(documentation.parse(path), around)


def test_a_page_that_is_right_passes(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "<!-- file: net.py -->\n```python\nvalue = 7\n```\n\n```python\nimport sys\nsys.path.insert(0, '')\n"
        "from net import value\n```\n```python\nprint(f'{value}\\n1.25 s\\nx\\ny\\nend')\n```\n"
        "```text\n7\n… s\n…\nend\n```\n<!-- until: up -->\n```sh\ntrap 'echo bye; exit 0' INT\necho up\n"
        "while true; do sleep 0.01; done\n```\n```text\nup\nbye\n```\n<!-- not run: needs Docker -->\n```sh\nfalse\n```\n"
    )
    run(documentation.parse(path), Surroundings(tmp_path / "directory", tmp_path, {}))


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One heading, `code` and all\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md#one-heading-code-and-all) [b](#here) [c](https://x.org)\n"
        "[d](gone.md) [e](other.md#two) [f](#there) [g](../outside.md)\n```sh\n# [h](gone.md)\n```\n"
    )
    assert documentation.broken_links(page, tmp_path) == ["gone.md", "other.md#two", "#there", "../outside.md"]


def test_the_zoo_table_is_what_the_cards_say() -> None:
    cards = {name: json.loads((zoo.directory(name) / "card.json").read_text()) for name in zoo.names()}
    rows = {row[0]: row[1:] for row in table(ROOT / "README.md", "## The zoo")}
    assert rows.keys() == cards.keys()
    for name, (architecture, _, accuracy) in rows.items():
        assert cards[name]["architecture"] in architecture
        assert accuracy.startswith(f"{100 * cards[name]['metrics']['accuracy']:.2f} %"), name


def default(name: str) -> str:
    field = Settings.model_fields[name]
    if field.default_factory is not None:
        return {"cache": "~/.cache/layercast", "compiled": "in the installation"}[name]
    value = field.default
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()


def test_the_settings_table_is_the_settings_class() -> None:
    rows = {row[0]: row[1:3] for row in table(DOCS / "serving.md", "## Settings")}
    wanted = {
        name: [default(name), "yes" if name in ModelSettings.model_fields else ""] for name in Settings.model_fields
    }
    assert rows == wanted


def test_the_metrics_table_is_what_a_server_with_models_shows(zoo_served: Running) -> None:
    # What counts calls of REST has no series before the first.
    urllib.request.urlopen(f"{zoo_served.http}/v2", timeout=10).close()
    with urllib.request.urlopen(zoo_served.metrics, timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    shown = {}
    for family in families:
        if not family.name.startswith(("python_", "process_", "layercast_gpu_")) and not family.name.endswith(
            "_created"
        ):
            sample = family.samples[0]
            name = sample.name if family.type == "counter" else family.name
            shown[name] = (family.type, set(sample.labels) - {"le"})
    rows = table(DOCS / "metrics.md", "## Every metric")
    assert {row[0]: (row[1], set(row[2].split(", ")) - {""}) for row in rows} == shown


def test_the_table_of_gpu_metrics_is_what_a_server_on_a_gpu_shows() -> None:
    rows = table(DOCS / "metrics.md", "## GPUs")
    shown = {family.name: (family.type, {*family._labelnames}) for family in Gpus(CollectorRegistry()).describe()}
    assert {row[0]: (row[1], set(row[2].split(", "))) for row in rows} == shown


def test_the_table_of_calls_is_what_the_server_answers(zoo_served: Running) -> None:
    answered = {}
    for name, method in {**INFERENCE, **FEATURES}.items():
        makes = {"unary": "unary_unary", "server_stream": "unary_stream", "bidi_stream": "stream_stream"}
        call = getattr(zoo_served.channel, makes[method.kind])(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        try:
            if method.kind == "bidi_stream":
                list(call(iter([method.request()]), timeout=30))
            elif method.kind == "server_stream":
                list(call(method.request(), timeout=30))
            else:
                call(method.request(), timeout=30)
            answered[name] = True
        except grpc.RpcError as error:
            answered[name] = "is not implemented by this server" not in (error.details() or "")
    rows = table(DOCS / "protocol.md", "## Calls")
    assert {row[0] for row in rows} == {name for name, there in answered.items() if there}


def test_the_tables_of_datatypes_and_reducers_are_whole() -> None:
    assert {row[0] for row in table(DOCS / "protocol.md", "## Datatypes")} == {*DATATYPES, BFLOAT16}
    assert [row[0] for row in table(DOCS / "features.md", "## Reducers")] == [*REDUCERS]


def test_the_table_of_explanations_names_every_method_and_option() -> None:
    rows = {
        row[0]: [option for option in row[2].split(", ") if option] for row in table(DOCS / "explain.md", "## Methods")
    }
    assert rows == {name: list(signature(method).parameters)[1:] for name, method in METHODS.items()}


def test_the_client_page_names_every_method_and_error() -> None:
    methods = {name for name in vars(client.Client) if not name.startswith("_")}
    assert {row[0].partition("(")[0] for row in table(DOCS / "client.md", "## Methods")} == methods
    assert methods == {name for name in vars(client.AsyncClient) if not name.startswith("_")}
    errors = {name for name in client.__all__ if issubclass(getattr(client, name), client.LayercastError)}
    assert {row[0] for row in table(DOCS / "client.md", "## Errors")} == errors - {"LayercastError"}


def test_the_client_page_names_every_verb() -> None:
    from layercast.client.main import COMMANDS

    rows = [row[0].split()[1:] for row in table(DOCS / "client.md", "## Command line")]
    assert [" ".join(takewhile(str.islower, words)) for words in rows] == list(COMMANDS)
