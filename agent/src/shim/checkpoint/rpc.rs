//! CRIU's remote procedure calls: what of `rpc.proto` berth says and hears, in protobuf's wire format. Pure.
//!
//! Hand-written, since it is a dozen fields and the generated messages would make the agent a megabyte larger.

/// A message under construction: field after field.
#[derive(Debug, Default, Clone)]
pub struct Message(Vec<u8>);

const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    pub fn number(&mut self, field: u32, value: u64) -> &mut Self {
        self.varint(u64::from(field) << 3 | VARINT);
        self.varint(value);
        self
    }

    pub fn flag(&mut self, field: u32) -> &mut Self {
        self.number(field, 1)
    }

    pub fn bytes(&mut self, field: u32, value: impl AsRef<[u8]>) -> &mut Self {
        let value = value.as_ref();
        self.varint(u64::from(field) << 3 | BYTES);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    pub fn message(&mut self, field: u32, value: &Message) -> &mut Self {
        self.bytes(field, &value.0)
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// One field of a message that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message in order; ends early, with `None` as the last item, where it is malformed.
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub fn of(message: &'a [u8]) -> Self {
        Self(message)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u32, Value<'a>)> {
        let key = self.varint()?;
        let value = match key & 7 {
            VARINT => Value::Number(self.varint()?),
            BYTES => {
                let length = self.varint()?;
                Value::Bytes(self.take(length)?)
            }
            FIXED64 => Value::Number(u64::from_le_bytes(self.take(8)?.try_into().ok()?)),
            FIXED32 => Value::Number(u32::from_le_bytes(self.take(4)?.try_into().ok()?).into()),
            _ => return None,
        };
        Some((u32::try_from(key >> 3).ok()?, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u32, Value<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

/// `criu_req_type`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Dump = 1,
    Restore = 2,
    Notify = 6,
}

/// `criu_req`
pub fn request(call: Call, options: &Message) -> Message {
    let mut request = Message::default();
    request.number(1, call as u64).message(2, options);
    request
}

/// The answer to a notification.
pub fn notified(success: bool) -> Message {
    let mut request = Message::default();
    request.number(1, Call::Notify as u64).number(3, success.into());
    request
}

/// `criu_opts`, as far as berth sets them.
#[derive(Debug, Default, Clone)]
pub struct Options(pub Message);

impl Options {
    /// `fd` is a number in the caller's own table.
    pub fn images_dir(&mut self, fd: i32) -> &mut Self {
        self.0.number(1, fd as u64);
        self
    }
    pub fn pid(&mut self, pid: i32) -> &mut Self {
        self.0.number(2, pid as u64);
        self
    }
    pub fn leave_running(&mut self) -> &mut Self {
        self.0.flag(3);
        self
    }
    pub fn tcp_established(&mut self) -> &mut Self {
        self.0.flag(5);
        self
    }
    pub fn tcp_close(&mut self) -> &mut Self {
        self.0.flag(52);
        self
    }
    pub fn evasive_devices(&mut self) -> &mut Self {
        self.0.flag(6);
        self
    }
    pub fn file_locks(&mut self) -> &mut Self {
        self.0.flag(8);
        self
    }
    /// Errors and warnings alone: more would be megabytes for a large process.
    pub fn log(&mut self, file: &str) -> &mut Self {
        self.0.number(9, 2).bytes(10, file);
        self
    }
    pub fn notify(&mut self) -> &mut Self {
        self.0.flag(12);
        self
    }
    pub fn root(&mut self, path: &[u8]) -> &mut Self {
        self.0.bytes(13, path);
        self
    }
    pub fn link_remap(&mut self) -> &mut Self {
        self.0.flag(18);
        self
    }
    /// The mount at `key` is known as `value` (dump); what is known as `key` is at `value` (restore).
    pub fn external_mount(&mut self, key: &str, value: &[u8]) -> &mut Self {
        let mut map = Message::default();
        map.bytes(1, key).bytes(2, value);
        self.0.message(23, &map);
        self
    }
    /// The restored root task becomes a child of the caller.
    pub fn sibling(&mut self) -> &mut Self {
        self.0.flag(26);
        self
    }
    /// What the image knows as `key` is descriptor `fd` of criu's own table.
    pub fn inherit(&mut self, key: &str, fd: i32) -> &mut Self {
        let mut map = Message::default();
        map.bytes(1, key).number(2, fd as u64);
        self.0.message(27, &map);
        self
    }
    /// Control groups are the caller's alone.
    pub fn ignore_cgroups(&mut self) -> &mut Self {
        self.0.number(34, 0);
        self
    }
    /// Files that were deleted and are still open are saved up to this size.
    pub fn deleted_bytes_max(&mut self, bytes: u32) -> &mut Self {
        self.0.number(35, bytes.into());
        self
    }
    pub fn external(&mut self, what: &str) -> &mut Self {
        self.0.bytes(37, what);
        self
    }
    pub fn join(&mut self, namespace: &str, file: &str) -> &mut Self {
        let mut map = Message::default();
        map.bytes(1, namespace).bytes(2, file);
        self.0.message(39, &map);
        self
    }
    /// For seizing all tasks.
    pub fn timeout_s(&mut self, seconds: u32) -> &mut Self {
        self.0.number(45, seconds.into());
        self
    }
    pub fn orphan_pts_master(&mut self) -> &mut Self {
        self.0.flag(50);
        self
    }
    /// The network namespace is nobody's but the pod's: no rules are needed to keep packets off it.
    pub fn no_network_lock(&mut self) -> &mut Self {
        self.0.number(64, 3);
        self
    }
}

/// `criu_resp`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Response {
    pub call: u64,
    pub success: bool,
    /// `criu_restore_resp.pid`
    pub pid: Option<i32>,
    /// `criu_notify.script`
    pub stage: Option<String>,
    pub errno: i32,
    pub message: String,
}

impl Response {
    /// `None`: not a response.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let mut response = Self::default();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        for field in Fields::of(bytes) {
            match field? {
                (1, Value::Number(call)) => response.call = call,
                (2, Value::Number(success)) => response.success = success != 0,
                (4, Value::Bytes(restore)) => {
                    for field in Fields::of(restore) {
                        if let (1, Value::Number(pid)) = field? {
                            response.pid = i32::try_from(pid).ok();
                        }
                    }
                }
                (5, Value::Bytes(notify)) => {
                    for field in Fields::of(notify) {
                        if let (1, Value::Bytes(script)) = field? {
                            response.stage = Some(text(script));
                        }
                    }
                }
                (7, Value::Number(errno)) => response.errno = errno as i32,
                (9, Value::Bytes(message)) => response.message = text(message),
                _ => {}
            }
        }
        Some(response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_as_protobuf_has_it() {
        let mut options = Options::default();
        options.images_dir(5).pid(300).log("dump.log").inherit("pipe:[7]", 900);
        let bytes = request(Call::Dump, &options.0);
        let expect = b"\x08\x01\x12\x21\x08\x05\x10\xac\x02\x48\x02\x52\x08dump.log\
            \xda\x01\x0d\x0a\x08pipe:[7]\x10\x84\x07";
        assert_eq!(bytes.as_bytes(), &expect[..]);
    }

    #[test]
    fn responses() {
        // RESTORE, success, restore {pid: 300}
        let response = Response::read(b"\x08\x02\x10\x01\x22\x03\x08\xac\x02").unwrap();
        assert_eq!(response, Response { call: 2, success: true, pid: Some(300), ..Response::default() });
        // NOTIFY, success, notify {script: "post-dump", pid: 1}
        let response = Response::read(b"\x08\x06\x10\x01\x2a\x0d\x0a\x09post-dump\x10\x01").unwrap();
        assert_eq!((response.call, response.stage.as_deref()), (6, Some("post-dump")));
        assert_eq!(Response::read(b"\x08"), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Response::read(&bytes);
        }

        #[test]
        fn fields_go_to_bytes_and_back(fields in proptest::collection::vec((1..2000u32, any::<u64>(), any::<Vec<u8>>()), 0..9)) {
            let mut message = Message::default();
            for (field, number, bytes) in &fields {
                message.number(*field, *number).bytes(*field, bytes);
            }
            let read: Vec<_> = Fields::of(message.as_bytes()).map(Option::unwrap).collect();
            let expect: Vec<_> = fields
                .iter()
                .flat_map(|(field, number, bytes)| [(*field, Value::Number(*number)), (*field, Value::Bytes(bytes))])
                .collect();
            prop_assert_eq!(read, expect);
        }
    }
}
