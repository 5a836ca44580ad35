"""The pages of docs/: snippets, links, navigation, figures; README's code is in test_readme.py."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from tools import docs_site

import rlhf_kernels as rk
from rlhf_kernels.ops._availability import OPERATION_NAMES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Repository pages that link to others, and are read on the site or at its side.
LINKED = [
    *PAGES,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
]
OPERATIONS = sorted(set((DOCS / "operations").glob("*.md")) - {DOCS / "operations" / "index.md"})
RUN = ROOT / "benchmarks" / "results" / "intel-xeon-2-cores.md"

# Pages whose Python needs a model or a batch of the reader's: these tests give it one.
PRESUMES = {
    DOCS / "integrations.md": "test_python_of_the_integrations of test_readme.py",
    DOCS / "operations" / "index.md": "test_python_of_a_step_of_ppo of test_readme.py",
}
# Sections of a page of an operation; other pages of the folder lack some.
SECTIONS = ["Formula", "Shapes", "Which trainer's function it replaces", "Measured"]
SECTIONS += ["When not to use it", "Example", "Reference"]
WITHOUT = {"head": {"Measured"}, "controllers": {"Shapes", "Measured"}}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fences(path: Path) -> list[tuple[str, str]]:
    """(language, code) of each fence."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def prose(path: Path) -> str:
    """The page without its code."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "code", text)


def slugs(path: Path) -> set[str]:
    """Anchors of the headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def tables(text: str) -> list[list[str]]:
    """Rows of all tables, the cells stripped."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    text = (ROOT / "mkdocs.yml").read_text()

    def entries(nav):
        for item in nav:
            (value,) = item.values()
            yield from [value] if isinstance(value, str) else entries(value)

    found = list(entries(yaml.safe_load(text)["nav"]))
    assert len(found) == len(set(found))
    added = {path for path in docs_site.added() if path.endswith(".md")}
    assert set(found) == {p.relative_to(DOCS).as_posix() for p in PAGES} | added


@pytest.mark.parametrize("path", [p for p in PAGES if fences(p)], ids=name)
def test_python_of_a_page(path, capsys):
    """Every Python block, one after another in one namespace; the others state a language."""
    code = [text for language, text in fences(path) if language == "python"]
    assert {language for language, _ in fences(path)} <= {"", "python", "text"}
    if path in PRESUMES:
        pytest.skip(f"run by {PRESUMES[path]}")
    if path.name == "head.md":
        pytest.importorskip("transformers")
    space: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for text in code:
            exec(compile(text, name(path), "exec"), space)


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_links_of_a_page_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists() and found.is_relative_to(ROOT), target
        assert not anchor or anchor in slugs(found), target


def test_links_of_the_site():
    """A page outside docs/ lies at its own path below the site's root, docs/ is the root itself."""
    link = docs_site.site_link
    results = "benchmarks/results/intel-xeon-2-cores.md"
    assert link("docs/faq.md", f"../{results}#targets") == f"{results}#targets"
    assert link("docs/operations/gae.md", f"../../{results}") == f"../{results}"
    assert link("docs/operations/gae.md", "../faq.md") == "../faq.md"
    assert link("benchmarks/README.md", "../docs/faq.md") == "../faq.md"
    assert link("docs/index.md", "../rlhf_kernels/trainer/algorithms.py") is None
    assert link("docs/index.md", "https://arxiv.org/abs/1506.02438#a") is not None
    for path in docs_site.added():
        assert (ROOT / path).is_file()


def test_every_public_name_is_in_the_reference_and_every_operation_has_a_page():
    texts = {path: path.read_text() for path in PAGES}
    listed = [
        n for text in texts.values() for n in re.findall(r"^::: rlhf_kernels\.(\w+)", text, re.M)
    ]
    assert sorted(listed) == sorted(rk.__all__)
    table = (DOCS / "operations" / "index.md").read_text()
    for path in OPERATIONS:
        assert f"({path.name})" in table, path.name
        found = re.findall(r"^## (.*)$", texts[path], re.MULTILINE)
        assert found == [s for s in SECTIONS if s not in WITHOUT.get(path.stem, ())], path.name
    assert {
        n for path in OPERATIONS for n in re.findall(r"::: rlhf_kernels\.(\w+)", texts[path])
    } >= set(OPERATION_NAMES)


def test_backends_of_the_table_of_operations():
    for cells in tables((DOCS / "operations" / "index.md").read_text())[2:]:
        operation = re.match(r"\[(\w+)", cells[0])[1]
        if operation in OPERATION_NAMES:
            plain = rk.supports(operation).backend == "torch"
            assert cells[2] == ("torch" if plain else "cpu, cuda, triton"), operation


def test_figures_are_those_of_the_run():
    """Every row of a table of times is a row of the committed results, cell by cell."""
    text = RUN.read_text().partition("## Every point")[2].partition("## Memory")[0]
    head, _, *rows = tables(text)
    known = {tuple(row[:2]): dict(zip(head, row, strict=True)) for row in rows}
    memory = RUN.read_text().partition("## Memory")[2].partition("\n## ")[0]
    checked = 0
    for path in (ROOT / "README.md", *PAGES):
        columns: list[str] = []
        for cells in tables(path.read_text()):
            if cells[0] == "operation" and "ours, ms" in cells:
                columns = cells
            elif columns and len(cells) == len(columns) and tuple(cells[:2]) in known:
                row = dict(zip(columns, cells, strict=True))
                held = row.pop("MiB: ours, eager, TRL", None)
                expected = known[tuple(cells[:2])]
                assert row == {k: expected[k] for k in row}, (name(path), cells)
                if held is not None:
                    op, label = cells[0].partition(",")[0], cells[1]
                    (line,) = [r for r in memory.splitlines() if r.startswith(f"- {op}, {label}:")]
                    for who, value in zip(("ours", "eager", "TRL"), held.split(", "), strict=True):
                        assert re.search(rf"\b{who} {value}\*", line), (cells, line)
                checked += 1
            elif columns and "ours, ms" in columns and cells[0].startswith(("-", ":")):
                continue
            else:
                assert not (columns and len(cells) == len(columns)), (name(path), cells)
                columns = []
    assert checked >= 40


def test_figures_of_whole_runs_are_in_their_results():
    """Figures in sentences, beside the file that has them."""
    targets = RUN.read_text().partition("## Targets")[2].partition("## Every point")[0]
    assert (targets.count("| met |"), targets.count("| missed |")) == (27, 7)
    points = {tuple(c[:2]): c for c in tables(RUN.read_text()) if len(c) == 13}
    head, readme = points["operation", "shape"], (ROOT / "README.md").read_text()
    for op, label, text in (
        ("token_logprobs + entropy", "bf16 256×151936",
         "{÷ eager} eager torch, {÷ compile} `torch.compile`, {÷ TRL} TRL, {÷ verl} verl"),
        ("linear_policy_loss", "bf16 4096×1024×32768",
         "{÷ eager} eager torch, {÷ TRL} TRL, {÷ Liger} Liger; 87 % of the rate"),
    ):  # fmt: skip
        row = dict(zip(head, points[f"{op}, forward+backward", label], strict=True))
        assert f"| {text.format_map(row)}" in readme
    assert row["of the limit"] == "87% GEMMs"
    held = "eager 1536*, TRL 4112*, verl 466, Liger 455, ours 214*"
    assert f"- linear_policy_loss, bf16 4096×1024×32768: {held}\n" in RUN.read_text()
    assert "| 214 MiB; eager torch 1536, TRL 4112, Liger 455 |" in readme
    trainers = (ROOT / "benchmarks" / "results" / "integrations.md").read_text()
    rows = {cells[0]: cells[1:] for cells in tables(trainers)}
    kl = [float(c[2].rstrip("×")) for n, c in rows.items() if n.startswith("OpenRLHF KL")]
    assert (min(kl), max(kl)) == (0.57, 0.96)
    of_trl = {n: c for n, c in rows.items() if n.startswith("TRL") and n != "TRL Reward"}
    times, held = ([float(c[i].rstrip("×")) for c in of_trl.values()] for i in (2, 3))
    assert (min(times), max(times), min(held), max(held)) == (1.9, 5.5, 3.8, 5.9)
    assert max(float(c[1]) for c in of_trl.values()) < 4e-5
    assert rows["verl gae, 256×2048"][2] == "46×"
    assert rows["OpenRLHF returns, 256×2048"][2] == "24×"
    assert rows["verl reinforce_plus_plus, 256×2048"][2] == "32×"
    assert {rows[f"TRL DPO {k}"][2] for k in ("sigmoid", "ipo", "hinge")} == {"4×", "3.3×", "2.9×"}
    data = json.loads(RUN.with_suffix(".json").read_text())["benchmarks"]
    eager = next(b for b in data if b["name"] == "test_gae[512x4096]")["extra_info"]["providers"]
    assert round(eager["eager"]["median"], 2) == 0.24
