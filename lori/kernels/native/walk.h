// Walks over the items of a step. Included by each instruction set's file, so everything here has internal linkage: the linker
// must not give one of them code compiled for another.
#pragma once

#include "layout.h"

namespace lori {
namespace {

// One window of one token.
struct Item {
  int token, window;
  const Segment* segment;
};

// The items of a step in their order: window by window, and in it token by token, so that what tokens share is in the cache. The
// route must have a segment.
class Walk {
 public:
  Walk(const Operands& operands, const Route& route, int64_t first)
      : num_windows_(operands.num_windows), segments_(route.segments), last_segment_(route.segments + route.num_segments - 1) {
    int64_t num_active = 0;
    for (const Segment* segment = segments_; segment <= last_segment_; segment++) num_active += segment->stop - segment->start;
    const Segment* segment = segments_;
    int64_t token = first % num_active;  // counted over the segments
    for (; token >= segment->stop - segment->start; segment++) token -= segment->stop - segment->start;
    item_ = {segment->start + static_cast<int>(token), static_cast<int>(first / num_active), segment};
  }

  const Item& operator*() const { return item_; }

  // Goes on to the next item; stays at the last.
  void operator++() {
    if (item_.token + 1 < item_.segment->stop)
      item_.token++;
    else if (item_.segment < last_segment_)
      item_ = {item_.segment[1].start, item_.window, item_.segment + 1};
    else if (item_.window + 1 < num_windows_)
      item_ = {segments_->start, item_.window + 1, segments_};
  }

  // Goes on by `count` items, all of which but the last step are within a segment.
  void skip(int count) {
    item_.token += count - 1;
    ++*this;
  }

 private:
  const int num_windows_;
  const Segment *segments_, *last_segment_;
  Item item_;
};

// Returns the first term at or after `term` whose adapter has entries in `window`.
inline int next_term(const Operands& operands, const Route& route, const Segment& segment, int term, int window) {
  while (term < segment.last_term && !operands.block(route.slots[term], window)) term++;
  return term;
}

}  // namespace
}  // namespace lori
