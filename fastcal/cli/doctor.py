"""`fastcal doctor`: what works on this machine, and the commands that put right what does not."""

from dataclasses import asdict

import typer

from fastcal.cli.terminal import NOT_OK, finish, print_rows, print_table, say, spinner, terminal


def doctor() -> None:
    """Try every library that fastcal uses, and say what works here. Exit status 1 if something is to be done.

    The text is made to be pasted into an issue: it names versions, and no folder of this machine.
    """
    with terminal() as console:
        from fastcal.doctor import examine

        with spinner(console) as show:
            findings = examine(lambda label: show(f"trying {label}"))
        print_rows(**findings.system)
        print_table(
            {"": "left", "status": "left", "what happened": "left", "installed": "left"},
            [(found.label, found.status, found.detail, ", ".join(found.wheels)) for found in findings.libraries],
        )
        say("")
        for job, lacking in findings.jobs.items():
            say(f"{job}: {'needs ' + ', '.join(lacking) if lacking else 'works'}")
        fixes: dict[str, list[str]] = {}
        for found in findings.libraries:
            if found.fix:
                fixes.setdefault(found.fix, []).append(found.label)
        for fix, labels in fixes.items():
            say(f"to mend {', '.join(labels)}: {fix}")
        say("something is to be done" if fixes else "nothing is to be done")
        finish(ok=findings.ok, **asdict(findings))
    if not findings.ok:
        raise typer.Exit(NOT_OK)
