//! What reads and writes of the regions do: the windows in their BAR, and the configuration space with the way to
//! the windows through it.
//!
//! Memory Space Enable is kept and not looked at: routing an address to the function is the client's part.

use pci::{AccessError, Effect, MSIX_BAR, PciFunction, Region};

use super::VirtioPci;
use super::capabilities::{BAR, BAR_SIZE, NOTIFY_OFF_MULTIPLIER, PAGE, Window};

impl VirtioPci {
    fn read_bar(&mut self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        match region {
            MSIX_BAR => self.interrupts.read_msix(offset, data),
            BAR => {
                let mut at = BAR.range(BAR_SIZE.into(), offset, data.len())?.start;
                let mut rest = data;
                while let Some((window, offset)) = Window::at(at).filter(|_| !rest.is_empty()) {
                    let (piece, tail) = rest.split_at_mut(rest.len().min(PAGE.saturating_sub(offset)));
                    self.read_window(window, offset, piece);
                    at = at.saturating_add(piece.len());
                    rest = tail;
                }
                Ok(())
            }
            absent => absent.range(0, offset, data.len()).map(drop),
        }
    }

    fn read_window(&mut self, window: Window, offset: usize, data: &mut [u8]) {
        data.fill(0);
        match window {
            Window::Common => self.common.read(offset, data),
            // Reading takes the bits, and INTx is deasserted (section 4.1.4.5).
            Window::Isr if offset == 0 => {
                if let Some(isr) = data.first_mut() {
                    *isr = self.interrupts.acknowledge_intx();
                }
            }
            Window::Device => {
                let length = self.device.config_len().saturating_sub(offset).min(data.len());
                if let Some(data @ [_, ..]) = data.get_mut(..length) {
                    self.device.read_config(offset, data);
                }
            }
            Window::Isr | Window::Notify => {}
        }
    }

    fn write_bar(&mut self, region: Region, offset: u64, data: &[u8]) -> Result<Effect, AccessError> {
        match region {
            MSIX_BAR => self.interrupts.write_msix(offset, data).map(|()| Effect::None),
            BAR => {
                let mut at = BAR.range(BAR_SIZE.into(), offset, data.len())?.start;
                let mut rest = data;
                while let Some((window, offset)) = Window::at(at).filter(|_| !rest.is_empty()) {
                    let (piece, tail) = rest.split_at(rest.len().min(PAGE.saturating_sub(offset)));
                    match self.write_window(window, offset, piece) {
                        Effect::None => {}
                        effect => return Ok(effect),
                    }
                    at = at.saturating_add(piece.len());
                    rest = tail;
                }
                Ok(Effect::None)
            }
            absent => absent.range(0, offset, data.len()).map(|_| Effect::None),
        }
    }

    fn write_window(&mut self, window: Window, offset: usize, data: &[u8]) -> Effect {
        match window {
            Window::Common => {
                let before = self.common.features_ok();
                let effect = self.common.write(offset, data);
                if !before && self.common.features_ok() {
                    self.device.features_acked(self.common.driver_features());
                }
                match effect {
                    Effect::Start | Effect::StartQueue(_) if !self.is_running() => Effect::None,
                    effect => effect,
                }
            }
            Window::Device if !self.common.is_resetting() => {
                let length = self.device.config_len().saturating_sub(offset).min(data.len());
                if let Some(data @ [_, ..]) = data.get(..length) {
                    self.device.write_config(offset, data);
                }
                Effect::None
            }
            Window::Notify => self.notify(offset, data),
            Window::Isr | Window::Device => Effect::None,
        }
    }

    /// An available buffer notification (section 4.1.5.2): the queue's index, in 2 bytes or in the
    /// low half of 4, at the queue's own address. Also when the device needs a reset: the queues that kept
    /// to the rules are served until it comes.
    fn notify(&self, offset: usize, data: &[u8]) -> Effect {
        let (2 | 4, &[low, high, ..]) = (data.len(), data) else { return Effect::None };
        let queue = u16::from_le_bytes([low, high]);
        let addressed = usize::from(queue) * NOTIFY_OFF_MULTIPLIER == offset;
        match self.common.queue(queue) {
            Some(registers) if addressed && registers.is_served() && self.may_access_memory() => Effect::Kick(queue),
            _ => Effect::None,
        }
    }

    fn write_config_space(&mut self, offset: u64, data: &[u8]) -> Result<Effect, AccessError> {
        let before = self.config.bus_master();
        self.config.write(offset, data)?;
        match (before, self.config.bus_master()) {
            (true, false) if self.common.driver_ok() => return Ok(Effect::Stop),
            (false, true) if self.is_running() => return Ok(Effect::Start),
            _ => {}
        }
        if self.pci_cfg.is_accessed(offset, data.len())
            && let Some((region, offset, length)) = self.pci_cfg.target(&self.config)
        {
            let data = self.config.load(self.pci_cfg.data(), length).to_vec();
            // What lies outside of every window is nothing to write to, and no error to the driver.
            return Ok(self.write_bar(region, offset, &data).unwrap_or(Effect::None));
        }
        Ok(Effect::None)
    }

    fn read_config_space(&mut self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        if self.pci_cfg.is_accessed(offset, data.len())
            && let Some((region, offset, length)) = self.pci_cfg.target(&self.config)
        {
            let mut bytes = [0; 4];
            if let Some(bytes) = bytes.get_mut(..length)
                && self.read_bar(region, offset, bytes).is_ok()
            {
                self.config.store(self.pci_cfg.data(), bytes);
            }
        }
        self.config.read(offset, data)
    }
}

impl PciFunction for VirtioPci {
    fn regions(&self) -> [u64; Region::COUNT] {
        self.config.regions()
    }

    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        match region {
            Region::Config => self.read_config_space(offset, data),
            bar => self.read_bar(bar, offset, data),
        }
    }

    fn write(&mut self, region: Region, offset: u64, data: &[u8]) -> Result<Effect, AccessError> {
        match region {
            Region::Config => self.write_config_space(offset, data),
            bar => self.write_bar(bar, offset, data),
        }
    }

    fn reset(&mut self) {
        self.config.reset();
        self.common.reset();
        self.device.reset();
    }
}
