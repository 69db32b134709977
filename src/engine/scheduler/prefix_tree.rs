//! Prompts that were prefilled before, page by page: a tree whose edges are pages full of tokens.
//!
//! A prompt that begins as an earlier one takes that one's pages instead of computing them again.
//! Only what prefill wrote is kept: keys and values of the same tokens from the prompt's start, which
//! are the same bits whoever computes them. A node has a claim of its own on its page; where memory
//! is short, the leaf that was used longest ago and that nobody else holds is given back.

use super::pages::{Page, PagePool};
use crate::backend::PAGE_LEN;
use std::collections::{BTreeSet, HashMap};

type Tokens = [u32; PAGE_LEN];
type NodeId = usize;

struct Node {
    page: Page,
    parent: Option<NodeId>,
    tokens: Tokens,
    children: HashMap<Tokens, NodeId>,
    last_use: u64,
}

/// Prefilled pages by the tokens that lead to them.
///
/// Invariant: whoever holds the page of a node holds those of its ancestors too, so that a node whose
/// page has no other holder has no such descendants either.
#[derive(Default)]
pub struct PrefixTree {
    /// Most nodes.
    capacity: usize,
    nodes: HashMap<NodeId, Node>,
    next_id: NodeId,
    roots: HashMap<Tokens, NodeId>,
    /// Nodes without children, the one used longest ago first.
    leaves: BTreeSet<(u64, NodeId)>,
    /// Counts lookups and insertions: time, as far as the tree knows it.
    uses: u64,
}

impl PrefixTree {
    /// A tree of at most `capacity` pages.
    pub fn new(capacity: usize) -> PrefixTree {
        PrefixTree {
            capacity,
            ..PrefixTree::default()
        }
    }

    /// Pages in the tree.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Claims on the pages of the longest known beginning of `tokens`.
    pub fn claim(&mut self, pool: &mut PagePool, tokens: &[u32]) -> Vec<Page> {
        self.uses += 1;
        let mut pages = Vec::new();
        let mut at = None;
        for tokens in tokens.as_chunks().0 {
            let Some(node) = self.child(at, tokens) else {
                break;
            };
            self.touch(node);
            pages.push(pool.share(&self.nodes[&node].page));
            at = Some(node);
        }
        pages
    }

    /// Takes claims on the full pages of a prompt that are not in the tree yet. `pages` are those of
    /// `tokens`, from the start; where the tree has a page for the same tokens already, which has the
    /// same contents, it takes the place of the one in `pages`.
    pub fn insert(&mut self, pool: &mut PagePool, tokens: &[u32], pages: &mut [Page]) {
        self.uses += 1;
        let mut at = None;
        for (tokens, page) in tokens.as_chunks().0.iter().zip(pages) {
            let node = match self.child(at, tokens) {
                Some(node) => {
                    let twin = pool.share(&self.nodes[&node].page);
                    pool.release(std::mem::replace(page, twin));
                    node
                }
                // The caller holds the path that is being inserted, so what goes is no part of it.
                None if self.len() < self.capacity || self.evict(pool) => {
                    self.add(at, *tokens, pool.share(page))
                }
                None => return,
            };
            self.touch(node);
            at = Some(node);
        }
    }

    /// Gives back the page that was used longest ago and that nobody else holds, if there is one.
    pub fn evict(&mut self, pool: &mut PagePool) -> bool {
        let idle = |node: &NodeId| pool.holders(&self.nodes[node].page) == 1;
        let Some(oldest) = self.leaves.iter().map(|leaf| leaf.1).find(idle) else {
            return false;
        };
        self.remove(pool, oldest);
        true
    }

    /// Pages that [`evict`](Self::evict) could give back one after the other.
    pub fn evictable(&self, pool: &PagePool) -> usize {
        let pages = self.nodes.values().map(|node| &node.page);
        pages.filter(|page| pool.holders(page) == 1).count()
    }

    fn child(&self, at: Option<NodeId>, tokens: &Tokens) -> Option<NodeId> {
        let children = match at {
            Some(node) => &self.nodes[&node].children,
            None => &self.roots,
        };
        children.get(tokens).copied()
    }

    fn touch(&mut self, id: NodeId) {
        let uses = self.uses;
        if let Some(node) = self.nodes.get_mut(&id) {
            let before = std::mem::replace(&mut node.last_use, uses);
            if self.leaves.remove(&(before, id)) {
                self.leaves.insert((uses, id));
            }
        }
    }

    fn add(&mut self, parent: Option<NodeId>, tokens: Tokens, page: Page) -> NodeId {
        let id = self.next_id;
        self.next_id += 1;
        let siblings = match parent.and_then(|parent| self.nodes.get_mut(&parent)) {
            Some(node) => {
                if let Some(parent) = parent {
                    self.leaves.remove(&(node.last_use, parent));
                }
                &mut node.children
            }
            None => &mut self.roots,
        };
        siblings.insert(tokens, id);
        let last_use = self.uses;
        self.nodes.insert(
            id,
            Node {
                page,
                parent,
                tokens,
                children: HashMap::new(),
                last_use,
            },
        );
        self.leaves.insert((last_use, id));
        id
    }

    fn remove(&mut self, pool: &mut PagePool, id: NodeId) {
        let Some(node) = self.nodes.remove(&id) else {
            return;
        };
        self.leaves.remove(&(node.last_use, id));
        match node.parent.and_then(|parent| self.nodes.get_mut(&parent)) {
            Some(parent) => {
                parent.children.remove(&node.tokens);
                if let (true, Some(id)) = (parent.children.is_empty(), node.parent) {
                    self.leaves.insert((parent.last_use, id));
                }
            }
            None => {
                self.roots.remove(&node.tokens);
            }
        }
        pool.release(node.page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn release(pool: &mut PagePool, pages: Vec<Page>) {
        for page in pages {
            pool.release(page);
        }
    }

    /// A prompt whose pages hold one repeated token each.
    fn prompt(pages: &[u32]) -> Vec<u32> {
        pages.iter().flat_map(|&token| [token; PAGE_LEN]).collect()
    }

    #[test]
    fn a_prompt_finds_the_pages_of_its_beginning() {
        let mut pool = PagePool::new(100);
        let mut tree = PrefixTree::new(100);
        let mut first = pool.allocate_many(3).unwrap();
        tree.insert(&mut pool, &prompt(&[1, 2, 3]), &mut first);
        let mut other = prompt(&[1, 2, 4]);
        let found = tree.claim(&mut pool, &other);
        assert_eq!(found[..], first[..2]);
        // A page that is not full is not looked for.
        other.truncate(2 * PAGE_LEN - 1);
        let shorter = tree.claim(&mut pool, &other);
        assert_eq!(shorter.len(), 1);
        release(&mut pool, first);
        release(&mut pool, found);
        release(&mut pool, shorter);
        assert_eq!((pool.used_pages(), tree.len()), (3, 3));
        while tree.evict(&mut pool) {}
        assert_eq!((pool.used_pages(), tree.len()), (0, 0));
    }

    #[test]
    fn pages_that_two_computed_are_kept_once() {
        let mut pool = PagePool::new(100);
        let mut tree = PrefixTree::new(100);
        let tokens = prompt(&[1, 2, 3]);
        let mut first = pool.allocate_many(2).unwrap();
        let mut second = pool.allocate_many(3).unwrap();
        tree.insert(&mut pool, &tokens[..2 * PAGE_LEN], &mut first);
        tree.insert(&mut pool, &tokens, &mut second);
        assert_eq!(first[..], second[..2]);
        assert_eq!(pool.used_pages(), 3);
        release(&mut pool, first);
        release(&mut pool, second);
        assert_eq!(tree.evictable(&pool), 3);
    }

    #[test]
    fn the_leaf_used_longest_ago_goes_first_and_held_ones_stay() {
        let mut pool = PagePool::new(100);
        let mut tree = PrefixTree::new(100);
        for tokens in [[1, 2], [1, 3], [4, 5]] {
            let mut pages = tree.claim(&mut pool, &prompt(&tokens));
            let missing = 2 - pages.len();
            pages.extend(pool.allocate_many(missing).unwrap());
            tree.insert(&mut pool, &prompt(&tokens), &mut pages);
            release(&mut pool, pages);
        }
        assert_eq!(tree.len(), 5);
        // [1, 2] is used again, and [4, 5] is held.
        let used = tree.claim(&mut pool, &prompt(&[1, 2]));
        release(&mut pool, used);
        let held = tree.claim(&mut pool, &prompt(&[4, 5]));
        assert_eq!(tree.evictable(&pool), 3);
        let known = |tree: &mut PrefixTree, pool: &mut PagePool, tokens: &[u32]| {
            let pages = tree.claim(pool, &prompt(tokens));
            let count = pages.len();
            release(pool, pages);
            count
        };
        assert!(tree.evict(&mut pool));
        assert_eq!(known(&mut tree, &mut pool, &[1, 3]), 1);
        assert_eq!(known(&mut tree, &mut pool, &[1, 2]), 2);
        assert!(tree.evict(&mut pool) && tree.evict(&mut pool));
        assert!(!tree.evict(&mut pool));
        assert_eq!(known(&mut tree, &mut pool, &[4, 5]), 2);
        release(&mut pool, held);
    }

    proptest! {
        /// Whatever is inserted, claimed, released and evicted: a claim gives the pages that were
        /// stored under those tokens, the tree keeps to its capacity, and no page is lost.
        #[test]
        fn pages_are_found_under_their_tokens(
            capacity in 0usize..8,
            prompts in prop::collection::vec(prop::collection::vec(0u32..3, 0..5), 1..40),
            held in prop::collection::vec(any::<bool>(), 40),
        ) {
            let mut pool = PagePool::new(1000);
            let mut tree = PrefixTree::new(capacity);
            let mut content: HashMap<usize, Vec<u32>> = HashMap::new();
            let mut claims = Vec::new();
            for (pages, keep) in prompts.iter().zip(held) {
                let tokens = prompt(pages);
                let mut claimed = tree.claim(&mut pool, &tokens);
                for (place, page) in claimed.iter().enumerate() {
                    prop_assert_eq!(&content[&page.index()], &pages[..place + 1]);
                }
                for place in claimed.len()..pages.len() {
                    let page = pool.allocate().unwrap();
                    content.insert(page.index(), pages[..place + 1].to_vec());
                    claimed.push(page);
                }
                tree.insert(&mut pool, &tokens, &mut claimed);
                prop_assert!(tree.len() <= capacity);
                match keep {
                    true => claims.push(claimed),
                    false => release(&mut pool, claimed),
                }
                let evictable = tree.evictable(&pool);
                prop_assert!(evictable <= tree.len());
            }
            for claimed in claims {
                release(&mut pool, claimed);
            }
            prop_assert_eq!(pool.used_pages(), tree.len());
            let mut evicted = 0;
            prop_assert_eq!(tree.evictable(&pool), tree.len());
            while tree.evict(&mut pool) {
                evicted += 1;
            }
            prop_assert_eq!((pool.used_pages(), tree.len()), (0, 0));
            prop_assert!(evicted <= capacity);
        }
    }
}
