"""TLS on the daemon's side. Certificates are replaced while it runs: new connections get what the files hold then."""

from __future__ import annotations

import base64
import re
import ssl
import stat
import time
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog

from sharpwatch.common.watched_file import WatchedFile
from sharpwatch.daemon.config.settings import TlsConfig
from sharpwatch.errors import SharpwatchError

log = structlog.get_logger(__name__)

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
_SEQUENCE, _INTEGER, _VERSION, _UTC_TIME = 0x30, 0x02, 0xA0, 0x17  # tags of DER
_DAY = 86_400.0


class ServerTls:
    """The certificate that the daemon shows, and whom it asks for one.

    Args:
        config: The files.

    Raises:
        SharpwatchError: A file can't be used.
    """

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._files = [
            WatchedFile(Path(path), read)
            for path, read in (
                (config.certificate, _read),
                (config.key, _read_key),
                *([(config.client_ca, _read)] if config.client_ca else []),
            )
        ]
        self._shown = self._read_all()
        self._refused = self._shown  # of those that could not be used, the ones that the log has
        self.http = self._context()

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """The credentials of the gRPC server, which asks for the newest files at each connection."""
        return grpc.dynamic_ssl_server_credentials(
            _grpc_configuration(self._shown), self._renewed, bool(self._config.client_ca)
        )

    def refresh(self) -> None:
        """Has the files, where they have changed, shown to all connections from now on."""
        try:
            found = self._read_all()
            if found in (self._shown, self._refused):
                return
            self._refused = found
            # Tried before it is shown: the certificate may have been replaced already, its key not yet.
            self._context()
            self.http.load_cert_chain(self._config.certificate, self._config.key)
        except (SharpwatchError, OSError) as error:
            log.error("certificate_refused", reason=str(error))  # noqa: TRY400  the message is the reason
            return
        self._shown = found
        log.info("certificate_read", file=self._config.certificate, expires_in_days=round(self.seconds_left / _DAY, 1))

    @property
    def seconds_left(self) -> float:
        """Seconds until the certificate expires; negative afterwards."""
        return not_after(self._shown[0]).timestamp() - time.time()

    def _renewed(self) -> grpc.ServerCertificateConfiguration:
        self.refresh()
        return _grpc_configuration(self._shown)

    def _read_all(self) -> tuple[bytes, ...]:
        return tuple(each.current() for each in self._files)

    def _context(self) -> ssl.SSLContext:
        """For HTTP, where no client has to show a certificate: those who scrape have none."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self._config.certificate, self._config.key)
        except (ssl.SSLError, OSError) as error:
            raise SharpwatchError(
                f"tls: {self._config.certificate} and {self._config.key} are not a certificate and its key: {error}"
            ) from error
        return context


def not_after(pem: bytes) -> datetime:
    """When the first certificate of a PEM file expires.

    Raises:
        SharpwatchError: It holds no certificate.
    """
    # By hand, as the standard library decodes certificates of peers alone. RFC 5280, 4.1: a certificate is a sequence
    # whose first part is the sequence [version], serial, algorithm, issuer, validity (from, to), ...
    match = _CERTIFICATE.search(pem)
    if match is None:
        raise SharpwatchError("tls: this is not a certificate in PEM")
    try:
        parts = _parts(_parts(_parts(base64.b64decode(match[1]))[0][1])[0][1])
        validity = parts[4 if parts[0][0] == _VERSION else 3][1]
        tag, text = _parts(validity)[1]
        form = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
        return datetime.strptime(text.decode(), form).replace(tzinfo=UTC)
    except (ValueError, IndexError) as error:
        raise SharpwatchError(f"tls: this is not a certificate in PEM: {error}") from error


def _parts(der: bytes) -> list[tuple[int, bytes]]:
    """The elements of a sequence, each as its tag and its content."""
    found, at = [], 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length & 0x80:
            size = length & 0x7F
            length, at = int.from_bytes(der[at : at + size], "big"), at + size
        found.append((tag, der[at : at + length]))
        at += length
    return found


def _grpc_configuration(files: tuple[bytes, ...]) -> grpc.ServerCertificateConfiguration:
    certificate, key, *client_ca = files
    return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca[0] if client_ca else None)


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SharpwatchError(f"tls: {path}: {error.strerror}") from error
    not_after(content)
    return content


def _read_key(path: Path) -> bytes:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        # A group may read it, as that of a system's certificates does.
        if mode & 0o007:
            raise SharpwatchError(f"tls: {path} has mode {mode:04o}: all users can read the key; run: chmod o= {path}")
        return path.read_bytes()
    except OSError as error:
        raise SharpwatchError(f"tls: {path}: {error.strerror}") from error
