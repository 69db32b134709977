//! Who holds which page of the KV cache: a state machine that knows nothing of what a page holds.
//!
//! Pages have a fixed length and a count of holders. The pages of a prompt are shared by all of its
//! candidates; each candidate's suffix has pages of its own; whoever is done releases, and the page
//! is free in the same step. A holder has a [`Page`] for each page it holds. It cannot be copied,
//! only [shared](PagePool::share) or [released](PagePool::release), so a page can be neither
//! released twice nor used after its release.

use crate::backend::PAGE_LEN;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// One holder's claim on a page. Dropping it without [`PagePool::release`] keeps the page taken.
#[derive(Debug, PartialEq, Eq, Hash)]
#[must_use = "a page that is not released stays taken"]
pub struct Page(u32);

impl Page {
    /// Place of the page in the cache's storage, below [`PagePool::high_water`].
    pub fn index(&self) -> usize {
        self.0 as usize
    }
}

/// Pages asked for and not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the KV cache is full: {wanted} more pages of {PAGE_LEN} tokens wanted, {free} of {capacity} free; \
     ask for fewer or shorter candidates, or allow the cache more memory"
)]
pub struct OutOfPages {
    pub wanted: usize,
    pub free: usize,
    pub capacity: usize,
}

/// All pages of a cache.
///
/// Invariant: every page below the high-water mark either is in the free list once and has no
/// holders, or is not in it and has some.
#[derive(Debug)]
pub struct PagePool {
    capacity: usize,
    /// Holders of each page that was ever taken.
    holders: Vec<u32>,
    /// Pages without holders. The lowest is taken next, so that a prompt's pages lie side by side
    /// again after others came and went.
    free: BinaryHeap<Reverse<u32>>,
}

impl PagePool {
    /// A pool of at most `capacity` pages, all free. Costs no memory until they are taken.
    pub fn new(capacity: usize) -> Self {
        // Pages are numbered by u32.
        let capacity = capacity.min(u32::MAX as usize);
        PagePool {
            capacity,
            holders: Vec::new(),
            free: BinaryHeap::new(),
        }
    }

    /// Takes one free page.
    pub fn allocate(&mut self) -> Result<Page, OutOfPages> {
        let page = match self.free.pop() {
            Some(Reverse(page)) => page,
            None if self.holders.len() < self.capacity => {
                self.holders.push(0);
                (self.holders.len() - 1) as u32
            }
            None => return Err(self.out_of_pages(1)),
        };
        let holders = &mut self.holders[page as usize];
        assert_eq!(*holders, 0, "page {page} was free and held");
        *holders = 1;
        Ok(Page(page))
    }

    /// Takes `count` free pages, or none if there are fewer.
    pub fn allocate_many(&mut self, count: usize) -> Result<Vec<Page>, OutOfPages> {
        if count > self.free_pages() {
            return Err(self.out_of_pages(count));
        }
        (0..count).map(|_| self.allocate()).collect()
    }

    /// A claim on the same page for one more holder.
    ///
    /// # Panics
    /// If the page belongs to another pool and is free in this one.
    pub fn share(&mut self, page: &Page) -> Page {
        let holders = self
            .holders
            .get_mut(page.index())
            .filter(|holders| **holders > 0);
        // A `Page` proves that this pool gave the page out and did not get it back.
        let holders = holders.expect("the page was allocated by this pool");
        *holders += 1;
        Page(page.0)
    }

    /// Gives up a claim, and says whether it was the last and the page is free now.
    ///
    /// # Panics
    /// If the page belongs to another pool and is free in this one.
    pub fn release(&mut self, page: Page) -> bool {
        let holders = self
            .holders
            .get_mut(page.index())
            .filter(|holders| **holders > 0);
        // As in `share`.
        let holders = holders.expect("the page was allocated by this pool");
        *holders -= 1;
        let freed = *holders == 0;
        if freed {
            self.free.push(Reverse(page.0));
        }
        assert!(
            self.free.len() <= self.holders.len(),
            "more pages free than there are"
        );
        freed
    }

    /// Most pages that can be taken at once.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Pages that can still be taken.
    pub fn free_pages(&self) -> usize {
        self.capacity - self.used_pages()
    }

    /// Pages that have holders.
    pub fn used_pages(&self) -> usize {
        self.holders.len() - self.free.len()
    }

    /// Most pages that were ever taken at once: every page's index is below it, so the cache needs
    /// storage for this many. Grows before it reaches for pages that were never used.
    pub fn high_water(&self) -> usize {
        self.holders.len()
    }

    /// How many hold the page.
    pub fn holders(&self, page: &Page) -> usize {
        self.holders.get(page.index()).copied().unwrap_or(0) as usize
    }

    fn out_of_pages(&self, wanted: usize) -> OutOfPages {
        OutOfPages {
            wanted,
            free: self.free_pages(),
            capacity: self.capacity,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[test]
    fn pages_come_back_when_the_last_holder_releases_them() {
        let mut pool = PagePool::new(2);
        let prompt = pool.allocate().unwrap();
        let shared = pool.share(&prompt);
        assert_eq!(pool.holders(&prompt), 2);
        let suffix = pool.allocate().unwrap();
        assert_ne!(prompt.index(), suffix.index());
        assert!(pool.allocate().is_err());
        assert!(!pool.release(prompt));
        assert!(pool.allocate().is_err());
        let index = shared.index();
        assert!(pool.release(shared));
        let again = pool.allocate().unwrap();
        assert_eq!(again.index(), index);
        pool.release(again);
        pool.release(suffix);
        assert_eq!((pool.used_pages(), pool.high_water()), (0, 2));
    }

    #[test]
    fn many_pages_or_none() {
        let mut pool = PagePool::new(3);
        let first = pool.allocate().unwrap();
        let error = pool.allocate_many(3).unwrap_err();
        assert_eq!(
            error,
            OutOfPages {
                wanted: 3,
                free: 2,
                capacity: 3
            }
        );
        assert_eq!(pool.free_pages(), 2);
        let rest = pool.allocate_many(2).unwrap();
        assert_eq!(pool.free_pages(), 0);
        for page in rest.into_iter().chain([first]) {
            pool.release(page);
        }
        assert_eq!(pool.free_pages(), 3);
        assert_eq!(pool.allocate_many(0).unwrap(), []);
    }

    #[test]
    fn absurd_capacities_cost_nothing() {
        let mut pool = PagePool::new(usize::MAX);
        assert_eq!(pool.capacity(), u32::MAX as usize);
        let page = pool.allocate().unwrap();
        pool.release(page);
        assert!(PagePool::new(0).allocate().is_err());
    }

    #[test]
    #[should_panic(expected = "allocated by this pool")]
    fn pages_of_another_pool_are_refused() {
        let page = PagePool::new(1).allocate().unwrap();
        PagePool::new(1).release(page);
    }

    #[derive(Clone, Debug)]
    enum Operation {
        Allocate,
        AllocateMany(usize),
        Share(usize),
        Release(usize),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            2 => Just(Operation::Allocate),
            1 => (0usize..6).prop_map(Operation::AllocateMany),
            2 => any::<usize>().prop_map(Operation::Share),
            3 => any::<usize>().prop_map(Operation::Release),
        ]
    }

    proptest! {
        /// Against a plain count of claims: pages are conserved, none is handed out while held,
        /// allocation fails exactly when too few are free.
        #[test]
        fn pages_are_conserved(
            capacity in 0usize..20,
            operations in prop::collection::vec(operation(), 0..200),
        ) {
            let mut pool = PagePool::new(capacity);
            let mut claims: Vec<Page> = Vec::new();
            let mut model: HashMap<usize, usize> = HashMap::new();
            let mut high_water = 0;
            for operation in operations {
                match operation {
                    Operation::Allocate => match pool.allocate() {
                        Ok(page) => {
                            prop_assert!(model.len() < capacity);
                            prop_assert_eq!(model.insert(page.index(), 1), None);
                            claims.push(page);
                        }
                        Err(error) => {
                            prop_assert_eq!(model.len(), capacity);
                            prop_assert_eq!(error, OutOfPages { wanted: 1, free: 0, capacity });
                        }
                    },
                    Operation::AllocateMany(count) => match pool.allocate_many(count) {
                        Ok(pages) => {
                            prop_assert_eq!(pages.len(), count);
                            for page in pages {
                                prop_assert_eq!(model.insert(page.index(), 1), None);
                                claims.push(page);
                            }
                        }
                        Err(_) => prop_assert!(model.len() + count > capacity),
                    },
                    Operation::Share(which) if !claims.is_empty() => {
                        let page = pool.share(&claims[which % claims.len()]);
                        *model.get_mut(&page.index()).unwrap() += 1;
                        claims.push(page);
                    }
                    Operation::Release(which) if !claims.is_empty() => {
                        let page = claims.swap_remove(which % claims.len());
                        let index = page.index();
                        let left = model[&index] - 1;
                        prop_assert_eq!(pool.release(page), left == 0);
                        if left == 0 {
                            model.remove(&index);
                        } else {
                            model.insert(index, left);
                        }
                    }
                    Operation::Share(_) | Operation::Release(_) => {}
                }
                high_water = high_water.max(model.len());
                prop_assert_eq!(pool.used_pages(), model.len());
                prop_assert_eq!(pool.free_pages(), capacity - model.len());
                prop_assert_eq!(pool.high_water(), high_water);
                for claim in &claims {
                    prop_assert!(claim.index() < pool.high_water());
                    prop_assert_eq!(pool.holders(claim), model[&claim.index()]);
                }
            }
        }
    }
}
