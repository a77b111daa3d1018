"""Certificates as text: the fleet's own authority, and what it signs for replicas. No files here.

ECDSA on P-256, which every OpenSSL since 1.0.1 and every GnuTLS takes.
"""

import time
from datetime import UTC, datetime, timedelta
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_AUTHORITY_LASTS_S = 30 * 365 * 86_400
# A node's clock may be behind.
_BACKDATED_S = 86_400
_KEY_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def new_authority(fleet: str) -> str:
    """Return a new authority: its private key and its certificate, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(fleet)
    certificate = (
        _unsigned(name, name, key.public_key(), _AUTHORITY_LASTS_S)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    )
    return _key_pem(key) + _signed(certificate, key)


def new_certificate(authority: str, dns_name: str, lasts_s: float) -> str:
    """Return a new private key, its certificate for a DNS name, and that of who signed it, in PEM.

    `authority` is what `new_authority` returned; ValueError if it is not.
    """
    signer = x509.load_pem_x509_certificate(authority.encode())
    loaded = load_pem_private_key(authority.encode(), password=None)
    signing_key = cast("ec.EllipticCurvePrivateKey", loaded)
    signers_id = signer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _unsigned(_name(dns_name.partition(".")[0]), signer.subject, key.public_key(), lasts_s)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(dns_name)]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signers_id),
            critical=False,
        )
    )
    return _key_pem(key) + _signed(certificate, signing_key) + _pem(signer)


def seconds_left(certificate: str) -> float:
    """Return how long the first certificate in a PEM text is still valid. Raises ValueError."""
    ends_at = x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc
    return ends_at.timestamp() - time.time()


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*wanted: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in wanted for usage in _KEY_USAGES})


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lasts_s: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(seconds=_BACKDATED_S))
        .not_valid_after(now + timedelta(seconds=lasts_s))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _signed(certificate: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> str:
    return _pem(certificate.sign(key, hashes.SHA256()))


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
