//! Which queries of a range have which blocks in their plan.

use super::problem::Sight;

/// For each block of keys the queries of a range that compute it exactly, ascending.
#[derive(Debug, Default)]
pub(crate) struct BlockLists {
    /// Where the list of each block starts, and where the last one ends.
    starts: Vec<u32>,
    queries: Vec<u32>,
    /// The blocks whose list is not empty: few of many where there are few queries, as when decoding.
    present: Vec<usize>,
}

impl BlockLists {
    /// Sorts the plan of a range by blocks: a counting sort. `plan` has `width` numbers for each query, of which those that
    /// are no block visible to the query, or the same one again, are left out.
    pub(crate) fn build(&mut self, blocks: usize, sights: &[Sight], plan: &[i32], width: usize) {
        self.starts.clear();
        self.starts.resize(blocks + 2, 0);
        // Counts are kept two places further on; so, once summed and counted up again, they are the starts.
        for_entries(sights, plan, width, |_, block| self.starts[block + 2] += 1);
        self.present.clear();
        for block in 0..blocks {
            if self.starts[block + 2] > 0 {
                self.present.push(block);
            }
            self.starts[block + 2] += self.starts[block + 1];
        }
        self.queries.clear();
        self.queries.resize(self.starts[blocks + 1] as usize, 0);
        for_entries(sights, plan, width, |query, block| {
            let place = &mut self.starts[block + 1];
            self.queries[*place as usize] = query;
            *place += 1;
        });
    }

    /// How many blocks have a list.
    pub(crate) fn blocks(&self) -> usize {
        self.starts.len().saturating_sub(2)
    }

    /// The blocks that some query has in its plan, ascending.
    pub(crate) fn present(&self) -> &[usize] {
        &self.present
    }

    /// The queries behind the `done` first ones of a block: the rest of them, then those of the blocks that follow.
    pub(crate) fn behind(&self, block: usize, done: usize) -> &[u32] {
        &self.queries[self.starts[block] as usize + done..]
    }

    /// How many of the queries of a block lie in it: the first ones, which see its keys up to their own. Later ones see all.
    pub(crate) fn own(&self, block: usize, sights: &[Sight]) -> usize {
        // Few, and none in blocks before the range; a search by halves would look at sights that are far apart.
        self.of(block).iter().take_while(|&&query| sights[query as usize].past <= block).count()
    }

    /// The queries of a block, numbered from the start of the range.
    pub(crate) fn of(&self, block: usize) -> &[u32] {
        &self.queries[self.starts[block] as usize..self.starts[block + 1] as usize]
    }
}

/// Calls `body(query, block)` for every block that the plan of each query rightly names.
fn for_entries(sights: &[Sight], plan: &[i32], width: usize, mut body: impl FnMut(u32, usize)) {
    for (query, sight) in (0..).zip(sights) {
        let row = &plan[query as usize * width..][..width];
        // Plans are ascending as a rule, and then one comparison tells that a number was not there before.
        let mut largest = -1;
        for (place, &number) in row.iter().enumerate() {
            if number <= largest && row[..place].contains(&number) {
                continue;
            }
            largest = largest.max(number);
            if let Some(block) = visible(number, sight) {
                body(query, block);
            }
        }
    }
}

/// The block that a number of a plan stands for, if the query sees any of it.
pub(crate) fn visible(number: i32, sight: &Sight) -> Option<usize> {
    usize::try_from(number).ok().filter(|&block| block < sight.blocks)
}
