"""Runs on the host: a port that passes on to another, up to so many bytes of each answer.

cut.py PORT TARGET BYTES [hold]

Then the connection is closed; with `hold` it is left open, and nothing more comes.
"""

import socket
import sys
import threading
from contextlib import suppress


def upwards(client: socket.socket, server: socket.socket) -> None:
    with suppress(OSError):
        while data := client.recv(65536):
            server.sendall(data)


def serve(client: socket.socket, target: int, left: int, hold: bool) -> None:
    server = socket.create_connection(("127.0.0.1", target))
    threading.Thread(target=upwards, args=(client, server), daemon=True).start()
    with suppress(OSError):
        while left > 0 and (data := server.recv(min(left, 65536))):
            client.sendall(data)
            left -= len(data)
        if hold and left == 0:
            threading.Event().wait()
    for end in (server, client):
        # A mere close waits for the other thread, which reads.
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


def main() -> None:
    """Listen until killed; the first line says that it does."""
    port, target, size = map(int, sys.argv[1:4])
    listener = socket.create_server(("127.0.0.1", port))
    print("listening", flush=True)
    while True:
        client, _ = listener.accept()
        work = (client, target, size, sys.argv[4:] == ["hold"])
        threading.Thread(target=serve, args=work, daemon=True).start()


if __name__ == "__main__":
    main()
