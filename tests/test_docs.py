"""The documents against the program: links, commands, options, arguments, and both languages in step."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
from pydantic import BaseModel

from peft_study import config
from peft_study.compat.arguments import NO_EFFECT, ExtraArguments, FinetuneArguments

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def slug(heading: str) -> str:
    """Returns the anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_anchor_is_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.M)
        assert anchor in {slug(heading) for heading in headings}, f"{target}#{anchor}"


def code_lines(page: Path) -> list[str]:
    return [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("    ")]


def test_both_languages_show_the_same_commands_and_outputs() -> None:
    assert code_lines(ROOT / "README.md") == code_lines(ROOT / "README.zh-CN.md")
    headings = [
        len(re.findall(r"^#+ ", (ROOT / name).read_text(encoding="utf-8"), re.M))
        for name in ("README.md", "README.zh-CN.md")
    ]
    assert headings[0] == headings[1]


def commands() -> dict[str, set[str]]:
    """Returns every command of the program with its options."""
    from typer.main import get_command

    from peft_study.cli import app

    found: dict[str, set[str]] = {}

    def walk(command: object, name: str) -> None:
        children = getattr(command, "commands", None)
        if children:
            for child, inner in children.items():
                walk(inner, f"{name} {child}".strip())
        else:
            options = {o for p in getattr(command, "params", []) for o in p.opts + p.secondary_opts}
            found[name] = options | {"--help"}

    walk(get_command(app), "")
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_shown_exists(page: Path) -> None:
    known = commands()
    ours = {f"--{f.name}" for kind in (FinetuneArguments, ExtraArguments) for f in dataclasses.fields(kind)}
    for line in code_lines(page):
        match = re.match(r"\s+\$? ?peft-study ((?:data )?[a-z]+)(.*)", line)
        if not match:
            continue
        name, rest = match.groups()
        assert name in known, line
        for option in re.findall(r"(?<!\S)(--?[a-zA-Z][\w-]*)", rest):
            if name == "finetune":
                assert option in ours or option.startswith(("--mixed", "--num_", "--use_deepspeed", "--help")), line
            else:
                assert option in known[name], line


def test_finetune_names_every_argument() -> None:
    text = (ROOT / "docs/finetune.md").read_text(encoding="utf-8")
    for kind in (FinetuneArguments, ExtraArguments):
        for field in dataclasses.fields(kind):
            assert f"`--{field.name}`" in text, field.name


def finetune_rows() -> dict[str, tuple[str, str]]:
    """Returns argument -> (default, what it does here) of the tables in docs/finetune.md."""
    text = (ROOT / "docs/finetune.md").read_text(encoding="utf-8")
    return {
        name: (default, here) for name, default, here in re.findall(r"^\| `--(\w+)` \| (.+?) \| (.+) \|$", text, re.M)
    }


def test_finetune_tells_the_defaults() -> None:
    rows = finetune_rows()
    for kind in (FinetuneArguments, ExtraArguments):
        for field in dataclasses.fields(kind):
            assert rows[field.name][0] == ("-" if field.default is None else f"`{field.default}`"), field.name


def test_finetune_says_which_arguments_have_no_effect() -> None:
    rows = finetune_rows()
    ignored = {f.name for f in dataclasses.fields(FinetuneArguments) if f.metadata["help"].startswith(NO_EFFECT)}
    assert {name for name, (_, here) in rows.items() if here.startswith("no effect")} == ignored


def test_every_setting_says_what_it_means() -> None:
    kinds = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, BaseModel)]
    plain = {"model", "data", "method", "training", "logging", "budget", "search", "finals"}
    for kind in kinds:
        for name, field in kind.model_fields.items():
            assert field.description or name in plain, f"{kind.__name__}.{name}"


def test_no_path_of_a_machine_and_no_registry_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    # put together here, so that this file does not hold what it looks for
    forbidden = re.compile(
        "|".join(["/ro" + "ot/", "/wo" + "rk/", "/ho" + r"me/\w+/", "/simp" + r"le\b", r"index-ur" + "l"])
    )
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".yaml", ".sh", ".json", ".jsonl", "") and path.is_file():
            found = forbidden.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert found is None, f"{name}: {found}"
