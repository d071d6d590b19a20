//! The fixed newstyle handshake (NBD protocol, "Fixed newstyle negotiation"), up to and with `NBD_OPT_GO`.
//!
//! It blocks, and is for threads that may. What a server says is bounded in length and number here, and in time by the
//! stream.

use std::io::{Read, Write};

use super::error::HandshakeError;
use super::export::{BlockSizes, Export};

const MAGIC: u64 = 0x4e42_444d_4147_4943; // NBDMAGIC
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // IHAVEOPT
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// `NBD_FLAG_FIXED_NEWSTYLE` and `NBD_FLAG_C_FIXED_NEWSTYLE`.
const FIXED_NEWSTYLE: u16 = 1 << 0;
/// `NBD_FLAG_NO_ZEROES` and `NBD_FLAG_C_NO_ZEROES`.
const NO_ZEROES: u16 = 1 << 1;

/// Bytes of one reply to an option, at most; a name or a message has 4096.
const MAX_REPLY: u32 = 16 << 10;
/// Replies to one option, at most; there are as many as kinds of information.
const MAX_REPLIES: usize = 64;

/// `NBD_OPT_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OptionType {
    StartTls = 5,
    Go = 7,
    StructuredReply = 8,
}

/// `NBD_REP_*`.
mod reply {
    pub(super) const ACK: u32 = 1;
    pub(super) const INFO: u32 = 3;
    pub(super) const ERRORS: u32 = 1 << 31;
    pub(super) const ERR_UNSUP: u32 = ERRORS | 1;
    pub(super) const ERR_POLICY: u32 = ERRORS | 2;
    pub(super) const ERR_TLS_REQD: u32 = ERRORS | 5;
    pub(super) const ERR_UNKNOWN: u32 = ERRORS | 6;
}

/// `NBD_INFO_*`.
mod info {
    pub(super) const EXPORT: u16 = 0;
    pub(super) const BLOCK_SIZE: u16 = 3;
}

/// One reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

impl Reply {
    /// What a server adds to an error, made fit to be shown.
    fn message(&self) -> String {
        String::from_utf8_lossy(&self.data).chars().filter(|char| !char.is_control()).take(200).collect()
    }
}

/// What was agreed upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agreement {
    pub(super) export: Export,
    /// Whether reads are answered by structured replies.
    pub(super) structured: bool,
}

/// Exchanges greetings.
pub(super) fn greet(stream: &mut (impl Read + Write)) -> Result<(), HandshakeError> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let [magic, option] = [0, 8].map(|at| u64_at(&greeting, at));
    if (magic, option) != (MAGIC, OPTION_MAGIC) {
        return Err(HandshakeError::NoServer);
    }
    let flags = u16_at(&greeting, 16);
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(HandshakeError::Old);
    }
    let ours = u32::from(FIXED_NEWSTYLE | flags & NO_ZEROES);
    stream.write_all(&ours.to_be_bytes())?;
    stream.flush()?;
    Ok(())
}

/// Asks for TLS, which begins when this returns.
pub(super) fn start_tls(stream: &mut (impl Read + Write)) -> Result<(), HandshakeError> {
    ask(stream, OptionType::StartTls, &[])?;
    let reply = answer(stream, OptionType::StartTls)?;
    match reply.kind {
        reply::ACK if reply.data.is_empty() => Ok(()),
        reply::ERR_UNSUP | reply::ERR_POLICY => Err(HandshakeError::NoTls(reply.message())),
        kind if kind & reply::ERRORS != 0 => Err(HandshakeError::Refused { code: kind, message: reply.message() }),
        _ => Err(HandshakeError::Nonsense("it answers NBD_OPT_STARTTLS otherwise than by yes or no")),
    }
}

/// How a server is to answer reads, if it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answers {
    /// In one piece, with a header in front: the fewest system calls of the server's, and wake-ups of ours.
    Simple,
    /// In chunks, of which holes have no data.
    Structured,
}

/// Asks for structured replies, if they are wanted, and for the export; the transmission phase begins when this returns.
pub(super) fn negotiate(
    stream: &mut (impl Read + Write),
    export: &str,
    answers: Answers,
) -> Result<Agreement, HandshakeError> {
    let structured = answers == Answers::Structured && structured_replies(stream)?;
    let mut request = Vec::with_capacity(export.len().saturating_add(8));
    let len = u32::try_from(export.len()).unwrap_or(u32::MAX);
    request.extend_from_slice(&len.to_be_bytes());
    request.extend_from_slice(export.as_bytes());
    request.extend_from_slice(&1_u16.to_be_bytes());
    request.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
    ask(stream, OptionType::Go, &request)?;
    let (mut found, mut sizes) = (None, None);
    for _ in 0..MAX_REPLIES {
        let reply = answer(stream, OptionType::Go)?;
        match reply.kind {
            reply::ACK => {
                let (size, flags) = found.ok_or(HandshakeError::Nonsense("it does not tell the export's size"))?;
                return Ok(Agreement { export: Export::new(size, flags, sizes)?, structured });
            }
            reply::INFO => match (reply.data.get(..2).map(|kind| u16_at(kind, 0)), reply.data.len()) {
                (Some(info::EXPORT), 12) => found = Some((u64_at(&reply.data, 2), u16_at(&reply.data, 10))),
                (Some(info::BLOCK_SIZE), 14) => {
                    let [minimum, preferred, maximum] = [2, 6, 10].map(|at| u32_at(&reply.data, at));
                    sizes = Some(BlockSizes { minimum, preferred, maximum });
                }
                (None | Some(info::EXPORT | info::BLOCK_SIZE), _) => {
                    return Err(HandshakeError::Nonsense("information of a wrong length"));
                }
                (Some(_), _) => {}
            },
            reply::ERR_UNSUP => return Err(HandshakeError::NoGo),
            reply::ERR_UNKNOWN => return Err(HandshakeError::NoExport(reply.message())),
            reply::ERR_TLS_REQD => return Err(HandshakeError::WantsTls),
            kind if kind & reply::ERRORS != 0 => {
                return Err(HandshakeError::Refused { code: kind, message: reply.message() });
            }
            _ => return Err(HandshakeError::Nonsense("a reply to NBD_OPT_GO that is none")),
        }
    }
    Err(HandshakeError::TooMuch)
}

/// Whether the server has structured replies.
fn structured_replies(stream: &mut (impl Read + Write)) -> Result<bool, HandshakeError> {
    ask(stream, OptionType::StructuredReply, &[])?;
    let reply = answer(stream, OptionType::StructuredReply)?;
    match reply.kind {
        reply::ACK => Ok(true),
        reply::ERR_TLS_REQD => Err(HandshakeError::WantsTls),
        // Nothing depends on it.
        kind if kind & reply::ERRORS != 0 => Ok(false),
        _ => Err(HandshakeError::Nonsense("it answers NBD_OPT_STRUCTURED_REPLY otherwise than by yes or no")),
    }
}

fn ask(stream: &mut impl Write, option: OptionType, data: &[u8]) -> Result<(), HandshakeError> {
    let mut message = Vec::with_capacity(data.len().saturating_add(16));
    message.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    message.extend_from_slice(&(option as u32).to_be_bytes());
    message.extend_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    message.extend_from_slice(data);
    stream.write_all(&message)?;
    stream.flush()?;
    Ok(())
}

fn answer(stream: &mut impl Read, option: OptionType) -> Result<Reply, HandshakeError> {
    let mut header = [0; 20];
    stream.read_exact(&mut header)?;
    if u64_at(&header, 0) != REPLY_MAGIC || u32_at(&header, 8) != option as u32 {
        return Err(HandshakeError::Nonsense("a reply to an option with a wrong magic, or to another option"));
    }
    let (kind, len) = (u32_at(&header, 12), u32_at(&header, 16));
    if len > MAX_REPLY {
        return Err(HandshakeError::TooMuch);
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok(Reply { kind, data })
}

/// The number at a place; bytes that are not there count as zero.
fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(number(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(number(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(number(bytes, at))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// A server that says what it says, whatever it is told.
    struct Script {
        says: io::Cursor<Vec<u8>>,
        heard: Vec<u8>,
    }

    impl Read for Script {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.says.read(into)
        }
    }

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.heard.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn script(parts: &[Vec<u8>]) -> Script {
        Script { says: io::Cursor::new(parts.concat()), heard: Vec::new() }
    }

    fn greeting(flags: u16) -> Vec<u8> {
        [&MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &flags.to_be_bytes()].concat()
    }

    fn says(option: OptionType, kind: u32, data: &[u8]) -> Vec<u8> {
        let numbers = [option as u32, kind, data.len() as u32].map(u32::to_be_bytes).concat();
        [&REPLY_MAGIC.to_be_bytes()[..], &numbers, data].concat()
    }

    fn export(size: u64, flags: u16) -> Vec<u8> {
        let data = [&info::EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
        says(OptionType::Go, reply::INFO, &data)
    }

    fn block_size(sizes: [u32; 3]) -> Vec<u8> {
        let data = [&info::BLOCK_SIZE.to_be_bytes()[..], &sizes.map(u32::to_be_bytes).concat()].concat();
        says(OptionType::Go, reply::INFO, &data)
    }

    fn structured(kind: u32) -> Vec<u8> {
        says(OptionType::StructuredReply, kind, &[])
    }

    fn ack() -> Vec<u8> {
        says(OptionType::Go, reply::ACK, &[])
    }

    fn negotiated(parts: &[Vec<u8>]) -> Result<Agreement, HandshakeError> {
        negotiate(&mut script(parts), "disk", Answers::Structured)
    }

    #[test]
    fn greetings() {
        for (flags, answer) in [(1_u16, 1_u32), (3, 3), (0xffff, 3)] {
            let mut server = script(&[greeting(flags)]);
            greet(&mut server).unwrap();
            assert_eq!(server.heard, answer.to_be_bytes());
        }
        assert!(matches!(greet(&mut script(&[greeting(2)])), Err(HandshakeError::Old)));
        let mut old = greeting(3);
        old[8] = 0;
        assert!(matches!(greet(&mut script(&[old])), Err(HandshakeError::NoServer)));
        assert!(matches!(greet(&mut script(&[b"HTTP/1.1 400 Bad Request".to_vec()])), Err(HandshakeError::NoServer)));
        assert!(matches!(greet(&mut script(&[greeting(1)[..17].to_vec()])), Err(HandshakeError::Io(_))));
    }

    #[test]
    fn what_is_said_of_an_export() {
        let unknown = says(OptionType::Go, reply::INFO, &[0, 2, b'x']);
        let mut server =
            script(&[structured(reply::ACK), block_size([1, 4096, 65536]), unknown, export(1 << 20, 0x1ff), ack()]);
        let agreed = negotiate(&mut server, "disk", Answers::Structured).unwrap();
        assert!(agreed.structured && agreed.export.read_only && agreed.export.features.multi_conn);
        assert_eq!((agreed.export.size, agreed.export.max_transfer), (1 << 20, 65536));
        let go = [
            &OPTION_MAGIC.to_be_bytes()[..],
            &7_u32.to_be_bytes(),
            &12_u32.to_be_bytes(),
            &4_u32.to_be_bytes(),
            b"disk",
            &[0, 1, 0, 3],
        ];
        assert_eq!(server.heard[16..], go.concat());
        let agreed = negotiated(&[structured(reply::ERR_UNSUP), export(512, 1), ack()]).unwrap();
        assert!(!agreed.structured && !agreed.export.features.flush);
        let mut server = script(&[export(512, 1), ack()]);
        assert!(!negotiate(&mut server, "disk", Answers::Simple).unwrap().structured);
        assert_eq!(server.heard, go.concat(), "nothing else is asked for");
    }

    #[test]
    fn refusals_are_told_apart() {
        let go = |kind| negotiated(&[structured(reply::ACK), says(OptionType::Go, kind, b"no\x1b[2J such thing")]);
        assert!(matches!(go(reply::ERR_UNSUP), Err(HandshakeError::NoGo)));
        assert!(matches!(go(reply::ERR_TLS_REQD), Err(HandshakeError::WantsTls)));
        assert!(matches!(go(reply::ERR_POLICY), Err(HandshakeError::Refused { .. })));
        let Err(HandshakeError::NoExport(message)) = go(reply::ERR_UNKNOWN) else { panic!() };
        assert_eq!(message, "no[2J such thing", "what a terminal would obey is left out");
        assert!(matches!(negotiated(&[structured(reply::ERR_TLS_REQD)]), Err(HandshakeError::WantsTls)));
    }

    #[test]
    fn lies_end_the_handshake() {
        let start = || structured(reply::ACK);
        let mut magic = start();
        magic[0] = 1;
        let huge =
            [REPLY_MAGIC.to_be_bytes().to_vec(), [7, reply::INFO, u32::MAX].map(u32::to_be_bytes).concat()].concat();
        let endless: Vec<_> = [start()].into_iter().chain((0..1000).map(|_| export(512, 1))).collect();
        for lie in [
            vec![magic],
            vec![says(OptionType::Go, reply::ACK, &[])],
            vec![structured(reply::INFO)],
            vec![start(), ack()],
            vec![start(), export(0, 1), ack()],
            vec![start(), export(512, 0), ack()],
            vec![start(), export(512, 1), block_size([0, 0, 0]), ack()],
            vec![start(), says(OptionType::Go, reply::INFO, &[])],
            vec![start(), says(OptionType::Go, reply::INFO, &[0, 0, 1])],
            vec![start(), says(OptionType::Go, reply::INFO, &[0, 3, 1])],
            vec![start(), says(OptionType::Go, 77, &[])],
            vec![start(), export(512, 1), huge],
            vec![start(), export(512, 1)],
        ] {
            assert!(negotiated(&lie).is_err(), "{lie:x?}");
        }
        assert!(matches!(negotiated(&endless), Err(HandshakeError::TooMuch)));
    }

    #[test]
    fn tls_is_begun_by_a_plain_yes_only() {
        let start = |kind, data: &[u8]| start_tls(&mut script(&[says(OptionType::StartTls, kind, data)]));
        assert!(start(reply::ACK, &[]).is_ok());
        assert!(matches!(start(reply::ERR_UNSUP, &[]), Err(HandshakeError::NoTls(_))));
        assert!(matches!(start(reply::ERR_POLICY, &[]), Err(HandshakeError::NoTls(_))));
        assert!(matches!(start(reply::ERR_UNKNOWN, &[]), Err(HandshakeError::Refused { .. })));
        assert!(start(reply::ACK, &[1]).is_err());
        assert!(start(reply::INFO, &[]).is_err());
    }
}
