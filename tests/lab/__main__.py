"""``python -m tests.lab``: the lab from a shell."""

import argparse
import contextlib
import signal
import subprocess
import sys

from tests.lab import Lab, LabError, base, running


def main() -> int:
    args = _parser().parse_args()
    try:
        return int(args.command(args) or 0)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, function: object, help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text)
        sub.set_defaults(command=function)
        sub.add_argument("--name", default="lab", help="of the lab (default: lab)")
        return sub

    up = command("up", _up, "start a lab; it stays until `down`")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--gateways", type=int, default=1)
    up.add_argument("--release", default="trixie", choices=["bookworm", "trixie", "sid"])
    up.add_argument("--bare", action="store_true", help="a site before it is provisioned")
    up.add_argument("--foreground", action="store_true", help="it ends with this command")
    command("down", _down, "stop a lab and leave nothing behind")
    command("status", _status, "the running labs, their hosts and their Slurm nodes")
    run = command("exec", _exec, "run a command on a host")
    run.add_argument("--user", default="fleet")
    run.add_argument("host")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="command")
    for name, function, text in (
        ("cut", _cut, "a host loses its power (--link: only its cable)"),
        ("power-on", _power_on, "and gets it back (--link: its cable)"),
    ):
        fault = command(name, function, text)
        fault.add_argument("--link", action="store_true")
        fault.add_argument("host")
    build = command("base", _base, "build the hosts' base, if it is missing")
    build.add_argument("--release", default="trixie", choices=["bookworm", "trixie", "sid"])
    return parser


def _up(args: argparse.Namespace) -> None:
    if args.name in running():
        print(f"lab {args.name}: already running")
        return
    lab = Lab.start(
        args.name,
        nodes=args.nodes,
        gateways=args.gateways,
        release=args.release,
        bare=args.bare,
        detached=not args.foreground,
    )
    print(f"ssh -F {lab.state}/ssh_config login    # or {', '.join(lab.hosts[1:])}")
    if args.foreground:
        with lab, contextlib.suppress(KeyboardInterrupt):
            print("Ctrl-C ends it")
            signal.pause()


def _down(args: argparse.Namespace) -> None:
    if args.name not in running():
        print(f"lab {args.name}: not running")
        return
    Lab.attach(args.name).stop()
    print(f"lab {args.name}: stopped")


def _status(_: argparse.Namespace) -> None:
    for name in running() or ["none is running"]:
        print(f"lab {name}")
    for lab in map(Lab.attach, running()):
        for host in lab.hosts:
            state = "on" if lab.is_on(host) else "off"
            print(f"{lab.name} {host:8} {lab.address(host):15} {state}")
        print(lab.run("login", ["sinfo"], check=False, timeout=20).stdout, end="")


def _exec(args: argparse.Namespace) -> int:
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    lab = Lab.attach(args.name)
    return subprocess.call(lab.argv(args.host, argv or ["bash"], user=args.user))


def _cut(args: argparse.Namespace) -> None:
    lab = Lab.attach(args.name)
    (lab.cut_link if args.link else lab.power_cut)(args.host)


def _power_on(args: argparse.Namespace) -> None:
    lab = Lab.attach(args.name)
    (lab.mend_link if args.link else lab.power_on)(args.host)


def _base(args: argparse.Namespace) -> None:
    print(base(args.release))


if __name__ == "__main__":
    sys.exit(main())
