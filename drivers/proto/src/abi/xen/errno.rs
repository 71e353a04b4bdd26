//! Error numbers of hypercalls (`xen/include/public/errno.h`): Linux x86 values, answered negative.

open_enum! {
    /// Why a hypercall (or xenstore) refused, as a positive number.
    pub enum Errno: i32 {
        /// Operation not permitted.
        EPERM = 1,
        /// No such file or directory.
        ENOENT = 2,
        /// No such domain.
        ESRCH = 3,
        /// Input/output error.
        EIO = 5,
        /// No such device or address.
        ENXIO = 6,
        /// Argument list too long.
        E2BIG = 7,
        /// Executable format error.
        ENOEXEC = 8,
        /// Bad file number.
        EBADF = 9,
        /// No child processes.
        ECHILD = 10,
        /// Try again.
        EAGAIN = 11,
        /// Out of memory.
        ENOMEM = 12,
        /// Permission denied.
        EACCES = 13,
        /// Bad address.
        EFAULT = 14,
        /// Resource busy.
        EBUSY = 16,
        /// Already exists.
        EEXIST = 17,
        /// Cross-device link.
        EXDEV = 18,
        /// No such device.
        ENODEV = 19,
        /// Not a directory.
        ENOTDIR = 20,
        /// Is a directory.
        EISDIR = 21,
        /// Invalid argument.
        EINVAL = 22,
        /// Table overflow.
        ENFILE = 23,
        /// Too many open.
        EMFILE = 24,
        /// No space left.
        ENOSPC = 28,
        /// Read-only.
        EROFS = 30,
        /// Too many links.
        EMLINK = 31,
        /// Argument out of domain.
        EDOM = 33,
        /// Result not representable.
        ERANGE = 34,
        /// Deadlock.
        EDEADLK = 35,
        /// Name too long.
        ENAMETOOLONG = 36,
        /// No locks available.
        ENOLCK = 37,
        /// Not implemented.
        ENOSYS = 38,
        /// Not empty.
        ENOTEMPTY = 39,
        /// No data available.
        ENODATA = 61,
        /// Time has passed.
        ETIME = 62,
        /// Not a data message.
        EBADMSG = 74,
        /// Value too large.
        EOVERFLOW = 75,
        /// Illegal byte sequence.
        EILSEQ = 84,
        /// Not a socket.
        ENOTSOCK = 88,
        /// Message too large.
        EMSGSIZE = 90,
        /// Operation not supported.
        EOPNOTSUPP = 95,
        /// Address in use.
        EADDRINUSE = 98,
        /// Address not available.
        EADDRNOTAVAIL = 99,
        /// No buffer space.
        ENOBUFS = 105,
        /// Already connected.
        EISCONN = 106,
        /// Not connected.
        ENOTCONN = 107,
        /// Timed out.
        ETIMEDOUT = 110,
        /// Connection refused.
        ECONNREFUSED = 111,
    }
}

impl Errno {
    /// Turns what a hypercall answered into a result.
    ///
    /// # Errors
    /// The answer is in `-4095..0`, as Linux and Xen reserve for error numbers.
    pub fn check(answer: i64) -> Result<u64, Self> {
        match answer {
            -4095..0 => Err(i32::try_from(-answer).map_or(Self::EINVAL, Self)),
            _ => Ok(answer.cast_unsigned()),
        }
    }

    /// The name, as xenstore sends it; `None` for an unlisted number.
    #[must_use]
    pub const fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::EPERM => "EPERM",
            Self::ENOENT => "ENOENT",
            Self::ESRCH => "ESRCH",
            Self::EIO => "EIO",
            Self::ENXIO => "ENXIO",
            Self::E2BIG => "E2BIG",
            Self::ENOEXEC => "ENOEXEC",
            Self::EBADF => "EBADF",
            Self::ECHILD => "ECHILD",
            Self::EAGAIN => "EAGAIN",
            Self::ENOMEM => "ENOMEM",
            Self::EACCES => "EACCES",
            Self::EFAULT => "EFAULT",
            Self::EBUSY => "EBUSY",
            Self::EEXIST => "EEXIST",
            Self::EXDEV => "EXDEV",
            Self::ENODEV => "ENODEV",
            Self::ENOTDIR => "ENOTDIR",
            Self::EISDIR => "EISDIR",
            Self::EINVAL => "EINVAL",
            Self::ENFILE => "ENFILE",
            Self::EMFILE => "EMFILE",
            Self::ENOSPC => "ENOSPC",
            Self::EROFS => "EROFS",
            Self::EMLINK => "EMLINK",
            Self::EDOM => "EDOM",
            Self::ERANGE => "ERANGE",
            Self::EDEADLK => "EDEADLK",
            Self::ENAMETOOLONG => "ENAMETOOLONG",
            Self::ENOLCK => "ENOLCK",
            Self::ENOSYS => "ENOSYS",
            Self::ENOTEMPTY => "ENOTEMPTY",
            Self::ENODATA => "ENODATA",
            Self::ETIME => "ETIME",
            Self::EBADMSG => "EBADMSG",
            Self::EOVERFLOW => "EOVERFLOW",
            Self::EILSEQ => "EILSEQ",
            Self::ENOTSOCK => "ENOTSOCK",
            Self::EMSGSIZE => "EMSGSIZE",
            Self::EOPNOTSUPP => "EOPNOTSUPP",
            Self::EADDRINUSE => "EADDRINUSE",
            Self::EADDRNOTAVAIL => "EADDRNOTAVAIL",
            Self::ENOBUFS => "ENOBUFS",
            Self::EISCONN => "EISCONN",
            Self::ENOTCONN => "ENOTCONN",
            Self::ETIMEDOUT => "ETIMEDOUT",
            Self::ECONNREFUSED => "ECONNREFUSED",
            _ => return None,
        })
    }

    /// The number of a name such as "ENOENT".
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        ALL.iter().copied().find(|e| e.name() == Some(name))
    }

    /// A short text, without capital and full stop.
    #[must_use]
    pub const fn message(self) -> &'static str {
        match self {
            Self::EPERM => "operation not permitted",
            Self::ENOENT => "no such file or directory",
            Self::ESRCH => "no such domain",
            Self::EIO => "input/output error",
            Self::ENXIO => "no such device or address",
            Self::E2BIG => "argument list too long",
            Self::ENOEXEC => "executable format error",
            Self::EBADF => "bad file number",
            Self::ECHILD => "no child processes",
            Self::EAGAIN => "try again",
            Self::ENOMEM => "out of memory",
            Self::EACCES => "permission denied",
            Self::EFAULT => "bad address",
            Self::EBUSY => "resource busy",
            Self::EEXIST => "already exists",
            Self::EXDEV => "cross-device link",
            Self::ENODEV => "no such device",
            Self::ENOTDIR => "not a directory",
            Self::EISDIR => "is a directory",
            Self::EINVAL => "invalid argument",
            Self::ENFILE => "table overflow",
            Self::EMFILE => "too many open",
            Self::ENOSPC => "no space left",
            Self::EROFS => "read-only",
            Self::EMLINK => "too many links",
            Self::EDOM => "argument out of domain",
            Self::ERANGE => "result not representable",
            Self::EDEADLK => "deadlock",
            Self::ENAMETOOLONG => "name too long",
            Self::ENOLCK => "no locks available",
            Self::ENOSYS => "not implemented",
            Self::ENOTEMPTY => "not empty",
            Self::ENODATA => "no data available",
            Self::ETIME => "time has passed",
            Self::EBADMSG => "not a data message",
            Self::EOVERFLOW => "value too large",
            Self::EILSEQ => "illegal byte sequence",
            Self::ENOTSOCK => "not a socket",
            Self::EMSGSIZE => "message too large",
            Self::EOPNOTSUPP => "operation not supported",
            Self::EADDRINUSE => "address in use",
            Self::EADDRNOTAVAIL => "address not available",
            Self::ENOBUFS => "no buffer space",
            Self::EISCONN => "already connected",
            Self::ENOTCONN => "not connected",
            Self::ETIMEDOUT => "timed out",
            Self::ECONNREFUSED => "connection refused",
            _ => "unlisted error",
        }
    }
}

/// Every listed number.
const ALL: &[Errno] = &[
    Errno::EPERM,
    Errno::ENOENT,
    Errno::ESRCH,
    Errno::EIO,
    Errno::ENXIO,
    Errno::E2BIG,
    Errno::ENOEXEC,
    Errno::EBADF,
    Errno::ECHILD,
    Errno::EAGAIN,
    Errno::ENOMEM,
    Errno::EACCES,
    Errno::EFAULT,
    Errno::EBUSY,
    Errno::EEXIST,
    Errno::EXDEV,
    Errno::ENODEV,
    Errno::ENOTDIR,
    Errno::EISDIR,
    Errno::EINVAL,
    Errno::ENFILE,
    Errno::EMFILE,
    Errno::ENOSPC,
    Errno::EROFS,
    Errno::EMLINK,
    Errno::EDOM,
    Errno::ERANGE,
    Errno::EDEADLK,
    Errno::ENAMETOOLONG,
    Errno::ENOLCK,
    Errno::ENOSYS,
    Errno::ENOTEMPTY,
    Errno::ENODATA,
    Errno::ETIME,
    Errno::EBADMSG,
    Errno::EOVERFLOW,
    Errno::EILSEQ,
    Errno::ENOTSOCK,
    Errno::EMSGSIZE,
    Errno::EOPNOTSUPP,
    Errno::EADDRINUSE,
    Errno::EADDRNOTAVAIL,
    Errno::ENOBUFS,
    Errno::EISCONN,
    Errno::ENOTCONN,
    Errno::ETIMEDOUT,
    Errno::ECONNREFUSED,
];

impl core::fmt::Display for Errno {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} ({:?})", self.message(), self)
    }
}
