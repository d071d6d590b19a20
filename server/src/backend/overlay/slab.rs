//! Things by small numbers that are used again.

/// A number for each thing that is in it, below a limit.
#[derive(Debug)]
pub(super) struct Slab<T> {
    places: Vec<Option<T>>,
    free: Vec<u16>,
    most: u16,
}

impl<T> Slab<T> {
    pub(super) fn new(most: u16) -> Self {
        Self { places: Vec::new(), free: Vec::new(), most }
    }

    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.len() >= usize::from(self.most)
    }

    /// Takes a thing, and says its number; gives it back if there is no room.
    pub(super) fn insert(&mut self, thing: T) -> Result<u16, T> {
        if self.is_full() {
            return Err(thing);
        }
        let number = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            (self.places.len() - 1) as u16 // fewer than `most`
        });
        if let Some(place) = self.places.get_mut(usize::from(number)) {
            *place = Some(thing);
        }
        Ok(number)
    }

    pub(super) fn get_mut(&mut self, number: u16) -> Option<&mut T> {
        self.places.get_mut(usize::from(number))?.as_mut()
    }

    pub(super) fn remove(&mut self, number: u16) -> Option<T> {
        let thing = self.places.get_mut(usize::from(number))?.take()?;
        self.free.push(number);
        Some(thing)
    }
}
