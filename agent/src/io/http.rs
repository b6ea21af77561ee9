//! HTTP/1.1, in plain or over TLS: an address, and a connection to it. What is asked and how long it may take is the
//! caller's.

use std::io;
use std::sync::Arc;

use berth_protocol::message::node::{DepotAccess, ServerIdentity};
use berth_protocol::tls;
use hyper::body::Body;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Host and port of `http://host[:port][/path]`, and the path; `None`: it is no such address.
pub fn split(url: &str) -> Option<(&str, &str)> {
    split_off("http://", url)
}

fn split_off<'a>(scheme: &str, url: &'a str) -> Option<(&'a str, &'a str)> {
    let rest = url.strip_prefix(scheme)?;
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    (!authority.is_empty()).then_some((authority, if path.is_empty() { "/" } else { path }))
}

/// Host and port of a depot, or of a node that has chunks of it; `None`: its address is none, or speaks in plain where it
/// should not.
pub fn authority(access: &DepotAccess) -> Option<&str> {
    let scheme = if access.tls.is_some() { "https://" } else { "http://" };
    Some(split_off(scheme, &access.url)?.0)
}

/// # Errors
/// Nobody listens there.
pub async fn connect<B>(authority: &str) -> io::Result<SendRequest<B>>
where
    B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    converse(reach(authority).await?).await
}

/// Connects to a depot, or to a node that has chunks of it.
///
/// # Errors
/// Nobody listens there, or another one than should.
pub async fn connect_to<B>(authority: &str, server: Option<&ServerIdentity>) -> io::Result<SendRequest<B>>
where
    B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    let Some(server) = server else { return connect(authority).await };
    let ca = CertificateDer::from_pem_slice(server.ca.as_bytes()).map_err(io::Error::other)?;
    let tls = tls::trusting(&ca).map_err(io::Error::other)?;
    connect_as(authority, &server.party.dns_name(), tls).await
}

/// Likewise over TLS, to whoever has a certificate of that name.
///
/// # Errors
/// Nobody listens there, or another one than should.
pub async fn connect_as<B>(authority: &str, name: &str, tls: Arc<ClientConfig>) -> io::Result<SendRequest<B>>
where
    B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    let stream = TlsConnector::from(tls).connect(name, reach(authority).await?).await?;
    converse(stream).await
}

async fn reach(authority: &str) -> io::Result<TcpStream> {
    let stream = match authority.contains(':') {
        true => TcpStream::connect(authority).await?,
        false => TcpStream::connect((authority, 80)).await?,
    };
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

async fn converse<B>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> io::Result<SendRequest<B>>
where
    B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    tokio::spawn(connection);
    Ok(sender)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(split("http://169.254.169.254/a/b"), Some(("169.254.169.254", "/a/b")));
        assert_eq!(split("http://m:8080"), Some(("m:8080", "/")));
        for bad in ["https://m/", "m/x", "http:///x"] {
            assert_eq!(split(bad), None, "{bad}");
        }
    }
}
