//! The xenbus handshake: what each end of a paravirtual device does when the other's state changes.
//!
//! Two machines without I/O: feed the other end's `state` node, do what comes back, say when it is
//! done. Neither knows xenstore, rings or devices, so both are tested by running them against each
//! other and against an end that jumps to any state at any time.
//! Spec: `xen/include/public/io/xenbus.h`; the order of steps is Linux's (`xenbus_probe.c`,
//! `xen-blkfront.c`, `xen-blkback/xenbus.c`), because that is who answers.

pub use crate::abi::xen_io::xenbus::XenbusState;

impl XenbusState {
    /// Reads a `state` node; anything but a decimal number is [`Self::UNKNOWN`], as is its absence.
    #[must_use]
    pub fn parse(value: &[u8]) -> Self {
        let number = core::str::from_utf8(value).ok().and_then(|text| text.trim().parse().ok());
        Self(number.unwrap_or(0))
    }
}

impl core::fmt::Display for XenbusState {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&self.0, f)
    }
}

/// How a device class connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    /// The frontend publishes its ring as `Initialised`, and is `Connected` after the backend is (vbd).
    Initialised,
    /// The frontend is `Connected` as soon as its ring is published (vif).
    Connected,
}

/// What the frontend has to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontStep {
    /// Nothing, until the backend's state changes.
    Wait,
    /// Write this state, and nothing else.
    Write(XenbusState),
    /// Read the backend's features, make a ring, publish it; then call [`Front::published`].
    Publish,
    /// Read the backend's details (size of the disk); then call [`Front::connected`].
    Connect,
    /// Take no more requests and leave the ring alone; then call [`Front::stopped`].
    Stop(Loss),
    /// The backend has let go of the ring: fail what is outstanding, end the grants; then call
    /// [`Front::released`].
    Release,
}

/// Why a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The backend asked for it (`Closing`).
    BackendCloses,
    /// The backend closed or started over without asking.
    BackendReset,
    /// The backend's directory is gone.
    BackendVanished,
    /// This end gave up.
    Abandoned,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FrontPhase {
    /// No ring; our state is `Initialising`.
    Waiting,
    /// `Publish` was asked for.
    Publishing,
    /// The ring is published; the backend has not connected.
    Published,
    /// `Connect` was asked for.
    Connecting,
    Connected,
    /// `Stop` was asked for.
    Stopping(Loss),
    /// Our state is `Closed`; the backend may still use the ring.
    Draining(Loss),
    /// `Release` was asked for.
    Releasing(Loss),
    /// No ring; our state is `Closed`.
    Closed(Loss),
}

/// The frontend's end of the handshake.
#[derive(Clone, Debug)]
pub struct Front {
    handshake: Handshake,
    phase: FrontPhase,
    backend: XenbusState,
    /// Whether to use the device at all.
    wanted: bool,
}

impl Front {
    /// A device that was just discovered, after its own `state` node was made `Initialising`.
    #[must_use]
    pub fn new(handshake: Handshake) -> Self {
        let (phase, backend) = (FrontPhase::Waiting, XenbusState::UNKNOWN);
        Self { handshake, phase, backend, wanted: true }
    }

    /// Tells the backend's state, read after its watch fired; answers what to do.
    ///
    /// Watches coalesce, so any state may follow any other. Call it again with the same state after
    /// each step, until it answers [`FrontStep::Wait`].
    pub fn backend(&mut self, state: XenbusState) -> FrontStep {
        self.backend = state;
        match self.phase {
            FrontPhase::Waiting => self.while_waiting(state),
            FrontPhase::Published | FrontPhase::Connecting | FrontPhase::Connected => {
                if let Some(loss) = self.loss(state) {
                    self.phase = FrontPhase::Stopping(loss);
                    return FrontStep::Stop(loss);
                }
                if self.phase == FrontPhase::Published && state == XenbusState::CONNECTED {
                    self.phase = FrontPhase::Connecting;
                    return FrontStep::Connect;
                }
                FrontStep::Wait
            }
            FrontPhase::Draining(loss) => {
                let forgot = matches!(loss, Loss::BackendReset | Loss::BackendVanished);
                if forgot || matches!(state, XenbusState::CLOSED | XenbusState::UNKNOWN) {
                    return self.release(loss);
                }
                FrontStep::Wait
            }
            FrontPhase::Closed(loss) if self.wanted => {
                // A backend that closed by its own will may be about to vanish: only if it comes
                // back by itself is it asked for anything. The others wait for our `Initialising`.
                let restart = match state {
                    XenbusState::INITIALISING | XenbusState::INIT_WAIT => true,
                    XenbusState::CLOSED => loss != Loss::BackendCloses,
                    _ => false,
                };
                if !restart {
                    return FrontStep::Wait;
                }
                self.phase = FrontPhase::Waiting;
                FrontStep::Write(XenbusState::INITIALISING)
            }
            // Steps that were asked for and are not done yet; or nobody wants the device.
            FrontPhase::Publishing
            | FrontPhase::Stopping(_)
            | FrontPhase::Releasing(_)
            | FrontPhase::Closed(_) => FrontStep::Wait,
        }
    }

    /// The ring is published; answers the state to write with it.
    pub fn published(&mut self) -> XenbusState {
        self.phase = FrontPhase::Published;
        match self.handshake {
            Handshake::Initialised => XenbusState::INITIALISED,
            Handshake::Connected => XenbusState::CONNECTED,
        }
    }

    /// The backend's details are read and the device can be used; answers the state to write.
    pub fn connected(&mut self) -> XenbusState {
        self.phase = FrontPhase::Connected;
        XenbusState::CONNECTED
    }

    /// The ring is left alone; answers the state to write.
    pub fn stopped(&mut self) -> XenbusState {
        if let FrontPhase::Stopping(loss) = self.phase {
            self.phase = FrontPhase::Draining(loss);
        }
        XenbusState::CLOSED
    }

    /// The backend has had long enough to let go: release the ring as it is (and leak what is in use).
    pub fn lose_patience(&mut self) -> FrontStep {
        match self.phase {
            FrontPhase::Draining(loss) => self.release(loss),
            _ => FrontStep::Wait,
        }
    }

    /// The ring is released. The state to write was already written.
    pub fn released(&mut self) {
        if let FrontPhase::Releasing(loss) = self.phase {
            self.phase = FrontPhase::Closed(loss);
        }
    }

    /// Publishing or connecting failed, the backend broke the protocol, or nobody wants the device.
    ///
    /// Answers [`FrontStep::Stop`] if there may be a ring, else the state to write, if any.
    pub fn abandon(&mut self) -> FrontStep {
        self.wanted = false;
        match self.phase {
            FrontPhase::Publishing
            | FrontPhase::Published
            | FrontPhase::Connecting
            | FrontPhase::Connected => {
                self.phase = FrontPhase::Stopping(Loss::Abandoned);
                FrontStep::Stop(Loss::Abandoned)
            }
            FrontPhase::Waiting => self.close(Loss::Abandoned),
            FrontPhase::Stopping(_)
            | FrontPhase::Draining(_)
            | FrontPhase::Releasing(_)
            | FrontPhase::Closed(_) => FrontStep::Wait,
        }
    }

    /// Connects again, after [`Self::abandon`] or after the backend closed.
    pub fn reconnect(&mut self) {
        self.wanted = true;
        if let FrontPhase::Closed(loss) = &mut self.phase {
            *loss = Loss::Abandoned;
        }
    }

    /// Whether the device can be used.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.phase == FrontPhase::Connected
    }

    /// Whether the backend still may use a ring that this end has left alone.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        matches!(self.phase, FrontPhase::Draining(_))
    }

    /// Whether there is no ring and our state is `Closed`.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self.phase, FrontPhase::Closed(_))
    }

    /// The backend's state that was last told.
    #[must_use]
    pub fn backend_state(&self) -> XenbusState {
        self.backend
    }

    fn while_waiting(&mut self, state: XenbusState) -> FrontStep {
        match state {
            _ if !self.wanted => self.close(Loss::Abandoned),
            XenbusState::INIT_WAIT => {
                self.phase = FrontPhase::Publishing;
                FrontStep::Publish
            }
            // It waits for our answer even if we never had a ring.
            XenbusState::CLOSING => self.close(Loss::BackendCloses),
            // It serves a former life of this guest: make it close, then start over.
            XenbusState::INITIALISED | XenbusState::CONNECTED => self.close(Loss::BackendReset),
            _ => FrontStep::Wait,
        }
    }

    /// Why a published or connected ring is lost, if this state means that.
    fn loss(&self, state: XenbusState) -> Option<Loss> {
        match state {
            _ if !self.wanted => Some(Loss::Abandoned),
            XenbusState::CLOSING => Some(Loss::BackendCloses),
            XenbusState::UNKNOWN => Some(Loss::BackendVanished),
            // It was ready for us before, so it has started over and forgotten the ring.
            XenbusState::INITIALISING | XenbusState::CLOSED => Some(Loss::BackendReset),
            XenbusState::INIT_WAIT if self.phase != FrontPhase::Published => {
                Some(Loss::BackendReset)
            }
            _ => None,
        }
    }

    fn release(&mut self, loss: Loss) -> FrontStep {
        self.phase = FrontPhase::Releasing(loss);
        FrontStep::Release
    }

    fn close(&mut self, loss: Loss) -> FrontStep {
        self.phase = FrontPhase::Closed(loss);
        FrontStep::Write(XenbusState::CLOSED)
    }
}

/// What the backend has to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackStep {
    /// Nothing, until the frontend's state changes.
    Wait,
    /// Write this state, and nothing else.
    Write(XenbusState),
    /// Write the features; then write `InitWait`.
    Offer,
    /// Map the frontend's ring, write the details; then call [`Back::connected`].
    Connect,
    /// Unmap the ring; then call [`Back::released`].
    Release,
    /// The frontend is gone: tear everything down.
    Destroy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BackPhase {
    New,
    Offered,
    Connecting,
    Connected,
    Releasing,
    Closed,
}

/// The backend's end of the handshake.
#[derive(Clone, Debug)]
pub struct Back {
    handshake: Handshake,
    phase: BackPhase,
    frontend: XenbusState,
    detaching: bool,
}

impl Back {
    /// A device that the toolstack has just written.
    #[must_use]
    pub fn new(handshake: Handshake) -> Self {
        let (phase, frontend) = (BackPhase::New, XenbusState::UNKNOWN);
        Self { handshake, phase, frontend, detaching: false }
    }

    /// Offers the device: the first step of all.
    pub fn offer(&mut self) -> BackStep {
        self.phase = BackPhase::Offered;
        BackStep::Offer
    }

    /// Tells the frontend's state; answers what to do. `UNKNOWN` means that its directory is gone.
    pub fn frontend(&mut self, state: XenbusState) -> BackStep {
        self.frontend = state;
        let has_ring = matches!(self.phase, BackPhase::Connecting | BackPhase::Connected);
        let ready = state == XenbusState::CONNECTED
            || (state == XenbusState::INITIALISED && self.handshake == Handshake::Initialised);
        match state {
            XenbusState::UNKNOWN if self.phase == BackPhase::New => BackStep::Wait,
            XenbusState::INITIALISING | XenbusState::CLOSED | XenbusState::UNKNOWN if has_ring => {
                self.phase = BackPhase::Releasing;
                BackStep::Release
            }
            XenbusState::UNKNOWN => BackStep::Destroy,
            XenbusState::CLOSING if has_ring => {
                self.phase = BackPhase::Releasing;
                BackStep::Release
            }
            XenbusState::INITIALISING if self.phase == BackPhase::Closed && !self.detaching => {
                self.offer()
            }
            XenbusState::CLOSED if self.detaching => BackStep::Destroy,
            _ if ready && self.phase == BackPhase::Offered && !self.detaching => {
                self.phase = BackPhase::Connecting;
                BackStep::Connect
            }
            _ => BackStep::Wait,
        }
    }

    /// The ring is mapped and the details are written; answers the state to write.
    pub fn connected(&mut self) -> XenbusState {
        self.phase = BackPhase::Connected;
        XenbusState::CONNECTED
    }

    /// The ring is unmapped; answers the state to write.
    pub fn released(&mut self) -> XenbusState {
        self.phase = BackPhase::Closed;
        XenbusState::CLOSED
    }

    /// The toolstack takes the device away: asks the frontend to let go.
    pub fn detach(&mut self) -> BackStep {
        self.detaching = true;
        BackStep::Write(XenbusState::CLOSING)
    }

    /// Whether the ring is in use.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.phase == BackPhase::Connected
    }
}

#[cfg(test)]
mod tests;
