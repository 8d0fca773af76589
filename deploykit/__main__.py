"""`python -m deploykit`, and the console script."""


def main() -> None:
    """Run the command line; a Ctrl-C while it is still being imported is no bug either."""
    try:
        from deploykit.cli import run_command_line
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run_command_line()


if __name__ == "__main__":
    main()
