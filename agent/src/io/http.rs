//! Plain HTTP/1.1: an address, and a connection to it. What is asked and how long it may take is the caller's.

use std::io;

use hyper::body::Body;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Host and port of `http://host[:port][/path]`, and the path; `None`: it is no such address.
pub fn split(url: &str) -> Option<(&str, &str)> {
    let rest = url.strip_prefix("http://")?;
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    (!authority.is_empty()).then_some((authority, if path.is_empty() { "/" } else { path }))
}

/// # Errors
/// Nobody listens there.
pub async fn connect<B>(authority: &str) -> io::Result<SendRequest<B>>
where
    B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    let stream = match authority.contains(':') {
        true => TcpStream::connect(authority).await?,
        false => TcpStream::connect((authority, 80)).await?,
    };
    let _ = stream.set_nodelay(true);
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
