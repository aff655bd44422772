"""`fastcal doctor`: the state of the libraries on this machine, and the commands that repair them."""

from dataclasses import asdict

import typer

from fastcal.cli.terminal import NOT_OK, finish, print_rows, print_table, say, spinner, terminal


def doctor() -> None:
    """Try every library that fastcal uses, and name the commands that repair what is broken.

    The text can be pasted into an issue: it has versions, and no folder names of this machine. Exit status 1 if
    something is to be done.
    """
    with terminal() as console:
        from fastcal.doctor import examine, versions

        with spinner(console) as status:
            findings = examine(lambda label: status.update(f"trying {label}"))
        system = versions()
        print_rows(**system)
        print_table(
            dict.fromkeys(("", "status", "result", "installed"), "left"),
            [(found.label, found.status, found.detail, ", ".join(found.wheels)) for found in findings],
        )
        fixes = dict.fromkeys(found.fix for found in findings if found.fix)
        for fix in fixes:
            say(f"to repair {', '.join(found.label for found in findings if found.fix == fix)}: {fix}")
        say("something is to be done" if fixes else "nothing is to be done")
        finish(ok=not fixes, system=system, libraries=[asdict(found) for found in findings])
    if fixes:
        raise typer.Exit(NOT_OK)
