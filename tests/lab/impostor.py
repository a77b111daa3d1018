"""Whoever binds a port that a replica has left: answers as that replica would, and writes down all.

    impostor.py ADDRESS PORT NAME RECORD [CERTIFICATE]

NAME is the served name `<model>@<job id>`. With a certificate (PEM, with its key) it speaks TLS.
The record gets every byte that arrived, of TLS what was inside.
"""

import json
import socket
import ssl
import sys
from pathlib import Path
from threading import Thread


def answer(name: str) -> bytes:
    """Return an answer that would do for every question of a probe or a client."""
    model = name.partition("@")[0]
    choice = {"text": " ba", "message": {"content": "ba"}, "finish_reason": "length"}
    body = json.dumps({"data": [{"id": model}, {"id": name}], "choices": [choice]}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def serve(connection: socket.socket, name: str, record: Path, tls: ssl.SSLContext | None) -> None:
    try:
        if tls is not None:
            connection = tls.wrap_socket(connection, server_side=True)
        with connection:
            received = connection.recv(65536)
            with record.open("ab") as out:
                out.write(received + b"\n")
            connection.sendall(answer(name))
    except OSError:
        connection.close()  # of TLS: whoever came has gone without a word


def main(address: str, port: str, name: str, record: str, certificate: str = "") -> None:
    tls = None
    if certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)
    Path(record).touch()
    with socket.create_server((address, int(port))) as server:
        print("listening", flush=True)
        while True:
            connection, _ = server.accept()
            Thread(target=serve, args=(connection, name, Path(record), tls), daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
