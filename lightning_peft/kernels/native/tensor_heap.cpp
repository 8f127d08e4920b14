// A heap for the tensors of a CPU, in place of the C library's. Called by training/host_memory.py.
//
// glibc (2.36) aligns a block by cutting the ends off a larger one. Small objects settle in the ends, and the block, once
// free, is too small for the next tensor of its size: a training step's holes are as large as half of what it holds. Here
// are tensors alone, so that a hole takes the next tensor that fits, and neighbours that are free become one.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <utility>

namespace {

constexpr size_t UNIT = 64;  // bytes to which torch aligns; the size of a block stands in one unit before its tensor

constexpr size_t OPENED = size_t(1) << 25;  // bytes that the heap asks for at a time

const size_t PAGE = sysconf(_SC_PAGESIZE);

// The first page that begins at this place or behind it.
char* page_from(char* place) {
  return reinterpret_cast<char*>((reinterpret_cast<size_t>(place) + PAGE - 1) / PAGE * PAGE);
}

class Heap {
 public:
  // Addresses alone: a system that overcommits nothing, or limits a process's data, counts what can be written to.
  bool reserve(size_t bytes) {
    void* found = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return false;
    begin_ = top_ = open_ = static_cast<char*>(found);
    end_ = top_ + bytes;
    return true;
  }

  // The smallest hole that is large enough, of these the first; null where there is no room.
  char* take(size_t size) {
    std::lock_guard<std::mutex> lock(mutex);
    auto fit = by_size_.lower_bound({size, nullptr});
    if (fit != by_size_.end()) {
      auto [room, place] = *fit;
      drop(by_place_.find(place));
      if (room > size) keep(place + size, room - size);
      return place;
    }
    if (static_cast<size_t>(end_ - top_) < size || !open(top_ + size)) return nullptr;
    top_ += size;
    return top_ - size;
  }

  void give_back(char* place, size_t size) {
    std::lock_guard<std::mutex> lock(mutex);
    auto next = by_place_.lower_bound(place);
    if (next != by_place_.end() && next->first == place + size) {
      size += next->second;
      drop(next++);
    }
    if (next != by_place_.begin()) {
      auto before = std::prev(next);
      if (before->first + before->second == place) {
        place = before->first;
        size += before->second;
        drop(before);
      }
    }
    if (place + size == top_)
      top_ = place;
    else
      keep(place, size);
  }

  bool has(const char* place) const { return place >= begin_ && place < end_; }

  std::mutex mutex;

 private:
  using Holes = std::map<char*, size_t>;

  // Let everything up to here be written to; false where the system refuses.
  bool open(char* stop) {
    if (stop <= open_) return true;
    size_t more = (stop - open_ + OPENED - 1) / OPENED * OPENED, left = end_ - open_;
    if (more > left) more = left;
    if (mprotect(open_, more, PROT_READ | PROT_WRITE)) return false;
    open_ += more;
    return true;
  }

  // Tensors are freed where nothing may be thrown: at the end of memory the hole is lost.
  void keep(char* place, size_t size) {
    try {
      by_place_.emplace(place, size);
      by_size_.emplace(size, place);
    } catch (const std::bad_alloc&) {
      by_place_.erase(place);
    }
  }

  void drop(Holes::iterator hole) {
    by_size_.erase({hole->second, hole->first});
    by_place_.erase(hole);
  }

  // From `top_` on nothing is taken, from `open_` on nothing can be.
  char *begin_ = nullptr, *top_ = nullptr, *open_ = nullptr, *end_ = nullptr;
  Holes by_place_;
  std::set<std::pair<size_t, char*>> by_size_;
};

// It outlives everything: tensors are freed after main has returned.
Heap& heap() {
  static Heap* one = new Heap;
  return *one;
}

struct TensorHeap final : c10::Allocator {
  c10::Allocator* other = nullptr;
  size_t smallest = 0, largest_kept = 0;
  std::atomic_flag said = ATOMIC_FLAG_INIT;

  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    size_t size = (bytes + 2 * UNIT - 1) / UNIT * UNIT;
    char* place = bytes < smallest ? nullptr : heap().take(size);
    if (place) {
      *reinterpret_cast<size_t*>(place) = size;
      data = place + UNIT;
      c10::profiledCPUMemoryReporter().New(data, bytes);
    } else {
      if (bytes >= smallest && !said.test_and_set())
        std::fputs("tensors lie in the C library's heap from here on: the system gives theirs no more memory\n", stderr);
      data = other->raw_allocate(bytes);
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  // oneDNN allocates and frees by it.
  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static void release(void* data);
};

TensorHeap* own = nullptr;

void TensorHeap::release(void* data) {
  if (!heap().has(static_cast<char*>(data))) return own->other->raw_deallocate(data);
  char* place = static_cast<char*>(data) - UNIT;
  c10::profiledCPUMemoryReporter().Delete(data);
  size_t size = *reinterpret_cast<size_t*>(place);
  if (size > own->largest_kept) {  // its whole pages go back to the system
    char *first = page_from(place), *last = page_from(place + size) - PAGE;
    madvise(first, last - first, MADV_DONTNEED);
  }
  heap().give_back(place, size);
}

}  // namespace

// Let tensors of `smallest` bytes and more lie in a heap of up to `room` bytes, of which only what was written to is
// taken; what those above `largest_kept` took is given back. Return 1; 0 where the system gives no such addresses.
extern "C" int use_tensor_heap(size_t room, size_t smallest, size_t largest_kept) {
  if (own) return 1;
  if (!heap().reserve(room)) return 0;
  own = new TensorHeap;
  own->other = c10::GetCPUAllocator();
  own->smallest = smallest;
  own->largest_kept = largest_kept;
  pthread_atfork([] { heap().mutex.lock(); }, [] { heap().mutex.unlock(); }, [] { heap().mutex.unlock(); });
  c10::SetCPUAllocator(own, 1);
  return 1;
}
