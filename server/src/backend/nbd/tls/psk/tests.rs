//! Against a server of OpenSSL's own, with suites and keys as no honest one would have them.

use openssl::pkey::PKey;
use openssl::rsa::Rsa;
use openssl::x509::{X509, X509NameBuilder};

use super::super::{Session, Tls};
use super::*;
use crate::backend::nbd::tls::Credentials;
use crate::backend::nbd::uri::Address;

const KEY: &str = "000102030405060708090a0b0c0d0e0f";

fn bytes() -> Vec<u8> {
    (0..16).collect()
}

/// Sessions of `alice`'s.
fn tls() -> Tls {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.psk");
    std::fs::write(&file, format!("alice:{KEY}\n")).unwrap();
    let credentials = Credentials::PreSharedKey { file, username: "alice".to_owned() };
    Tls::load(&credentials, &Address::Unix("/nowhere".into())).unwrap()
}

/// A server that knows `alice`'s key, and is spoilt by `spoil`.
fn server(spoil: impl FnOnce(&mut SslContextBuilder)) -> SslStream<Buffers> {
    let mut builder = SslContextBuilder::new(SslMethod::tls_server()).unwrap();
    builder.set_psk_server_callback(|_, name, place| {
        let key = bytes();
        if name != Some(b"alice") {
            return Ok(0);
        }
        place[..key.len()].copy_from_slice(&key);
        Ok(key.len())
    });
    builder.set_tmp_dh(&openssl::dh::Dh::get_2048_256().unwrap()).unwrap();
    spoil(&mut builder);
    let buffers = Buffers { received: vec![0; 1 << 20], from: 0, to: 0, sent: Vec::new() };
    SslStream::new(Ssl::new(&builder.build()).unwrap(), buffers).unwrap()
}

/// What a client and a server exchange, the server's side of which is done whenever the client waits.
struct Wire<'a> {
    server: &'a mut SslStream<Buffers>,
    done: bool,
}

impl Wire<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let buffers = self.server.get_mut();
        if buffers.from == buffers.to {
            (buffers.from, buffers.to) = (0, 0);
        }
        buffers.received[buffers.to..][..bytes.len()].copy_from_slice(bytes);
        buffers.to += bytes.len();
    }
}

impl Read for Wire<'_> {
    /// A few bytes at a time: what comes need not be whole.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if !self.done {
            self.done = self.server.accept().is_ok();
        }
        let sent = &mut self.server.get_mut().sent;
        let len = into.len().min(sent.len()).min(7);
        into[..len].copy_from_slice(&sent[..len]);
        sent.drain(..len);
        Ok(len)
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Shakes hands: the client's session, and the suite that was agreed on.
fn agree(server: &mut SslStream<Buffers>) -> Result<(Session, String), String> {
    let mut session = tls().session().unwrap();
    let mut wire = Wire { server, done: false };
    session.handshake(&mut wire).map_err(|error| error.to_string())?;
    // The end of the client's side may be all that the server waits for.
    if !wire.done {
        wire.server.accept().unwrap();
    }
    let suite = server.ssl().current_cipher().unwrap().name().to_owned();
    Ok((session, suite))
}

fn tls12(builder: &mut SslContextBuilder, suites: &str) {
    builder.set_max_proto_version(Some(SslVersion::TLS1_2)).unwrap();
    builder.set_cipher_list(suites).unwrap();
}

fn certificate(builder: &mut SslContextBuilder) {
    let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
    let mut name = X509NameBuilder::new().unwrap();
    name.append_entry_by_text("CN", "localhost").unwrap();
    let name = name.build();
    let mut certificate = X509::builder().unwrap();
    certificate.set_subject_name(&name).unwrap();
    certificate.set_issuer_name(&name).unwrap();
    certificate.set_not_before(&openssl::asn1::Asn1Time::days_from_now(0).unwrap()).unwrap();
    certificate.set_not_after(&openssl::asn1::Asn1Time::days_from_now(1).unwrap()).unwrap();
    certificate.set_pubkey(&key).unwrap();
    certificate.sign(&key, openssl::hash::MessageDigest::sha256()).unwrap();
    builder.set_certificate(&certificate.build()).unwrap();
    builder.set_private_key(&key).unwrap();
}

fn read_all(session: &mut Session, mut bytes: &[u8]) -> Result<(Vec<u8>, bool), TlsError> {
    let (mut read, mut piece) = (Vec::new(), [0; 100]);
    while !bytes.is_empty() {
        session.receive(&mut bytes)?;
        loop {
            match session.read(&mut piece)? {
                Plain::Bytes(len) => read.extend_from_slice(&piece[..len]),
                Plain::Nothing => break,
                Plain::Closed => return Ok((read, true)),
            }
        }
    }
    Ok((read, false))
}

#[test]
fn what_goes_in_comes_out_on_the_other_side() {
    for suites in ["", "ECDHE-PSK-CHACHA20-POLY1305", "DHE-PSK-AES128-GCM-SHA256", "DHE-PSK-AES256-GCM-SHA384"] {
        let mut server = server(|builder| {
            if !suites.is_empty() {
                tls12(builder, suites)
            }
        });
        let (mut session, agreed) = agree(&mut server).unwrap();
        assert!(agreed == suites || suites.is_empty() && agreed == "TLS_AES_128_GCM_SHA256", "{suites}: {agreed}");
        let plain: Vec<u8> = (0..100_000_u32).map(|number| number as u8).collect();
        session.write(&plain).unwrap();
        assert!(session.wants_write());
        let mut sent = Vec::new();
        session.send(&mut sent).unwrap();
        assert!(!session.wants_write() && sent.len() > plain.len());
        Wire { server: &mut server, done: true }.put(&sent);
        let mut came = vec![0; plain.len()];
        server.read_exact(&mut came).unwrap();
        assert!(came == plain, "{agreed}");
        // What there is in `sent` before are tickets of TLS 1.3, which nobody uses.
        server.write_all(&plain).unwrap();
        let (came, closed) = read_all(&mut session, &std::mem::take(&mut server.get_mut().sent)).unwrap();
        assert!(came == plain && !closed, "{agreed}");
        server.shutdown().unwrap();
        let (came, closed) = read_all(&mut session, &std::mem::take(&mut server.get_mut().sent)).unwrap();
        assert!(came.is_empty() && closed, "{agreed}");
    }
}

#[test]
fn nothing_weaker_is_agreed_to() {
    for suites in ["PSK-AES128-GCM-SHA256", "ECDHE-PSK-AES128-CBC-SHA256", "RSA-PSK-AES128-GCM-SHA256"] {
        let mut server = server(|builder| {
            certificate(builder);
            tls12(builder, suites);
        });
        let refusal = agree(&mut server).map(|(_, suite)| suite).unwrap_err();
        assert!(refusal.contains("does not take the key of \"alice\"") && refusal.contains("keys.psk"), "{refusal}");
    }
    let mut old = server(|builder| builder.set_max_proto_version(Some(SslVersion::TLS1_1)).unwrap());
    assert!(agree(&mut old).is_err());
}

#[test]
fn a_certificate_is_no_key() {
    // In TLS 1.3 such a server ignores the key that is offered.
    let mut server = server(|builder| {
        certificate(builder);
        builder.set_psk_server_callback(|_, _, _| Ok(0));
    });
    let refusal = agree(&mut server).map(|(_, suite)| suite).unwrap_err();
    assert!(refusal.contains("shows a certificate"), "{refusal}");
}

#[test]
fn another_key_is_refused() {
    for most in [SslVersion::TLS1_3, SslVersion::TLS1_2] {
        let mut server = server(|builder| {
            builder.set_max_proto_version(Some(most)).unwrap();
            builder.set_psk_server_callback(|_, _, place| {
                place[..16].fill(7);
                Ok(16)
            });
        });
        let refusal = agree(&mut server).map(|(_, suite)| suite).unwrap_err();
        assert!(refusal.contains("does not take the key of \"alice\""), "{refusal}");
    }
}

#[test]
fn bytes_that_were_changed_end_a_session() {
    let mut server = server(|_| {});
    let (mut session, _) = agree(&mut server).unwrap();
    let tickets = std::mem::take(&mut server.get_mut().sent);
    assert_eq!(read_all(&mut session, &tickets).unwrap(), (Vec::new(), false));
    server.write_all(b"as it was written").unwrap();
    let mut sent = std::mem::take(&mut server.get_mut().sent);
    *sent.last_mut().unwrap() ^= 1;
    assert!(matches!(read_all(&mut session, &sent), Err(TlsError::PreSharedKey(PskError::Broken(_)))));
    // It stays over.
    assert!(read_all(&mut session, &sent).is_err());
}

#[test]
fn what_is_kept_has_a_bound() {
    let mut session = tls().session().unwrap();
    let mut endless = io::repeat(0x16);
    let mut taken = 0;
    while let Ok(len) = session.receive(&mut endless) {
        taken += len;
    }
    assert_eq!(taken, MAX_RECEIVED);
    let mut buffers = Buffers { received: Vec::new(), from: 0, to: 0, sent: Vec::new() };
    let written: usize = std::iter::from_fn(|| buffers.write(&[0; 1000]).ok()).sum();
    assert!((MAX_SENT - 1000..=MAX_SENT).contains(&written));
}

/// Whatever a server says in place of a handshake ends it.
#[test]
fn noise_is_no_handshake() {
    struct Noise(u64);
    impl Read for Noise {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            for byte in into.iter_mut() {
                self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (self.0 >> 56) as u8;
            }
            Ok(into.len())
        }
    }
    impl Write for Noise {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    for seed in 0..50 {
        assert!(tls().session().unwrap().handshake(&mut Noise(seed)).is_err());
    }
}
